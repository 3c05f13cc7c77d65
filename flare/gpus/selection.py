"""Select the GPUs of a run. Standard library only.

``query_gpus`` (nvidia_smi.py) lists the GPUs. ``select_gpus`` is a pure function that selects some of them: by words
of the model name, by nvidia-smi's index, or all. The shell launcher, the Python script and ``python -m flare.gpus``
(__main__.py) call it before torch is imported.

A preset ``CUDA_VISIBLE_DEVICES`` (a scheduler's) is a limit. It is read as CUDA reads it: indices in nvidia-smi's
(PCI) order; GPU UUIDs and unique prefixes of them; MIG device UUIDs (``MIG-<uuid>`` and the older
``MIG-GPU-<uuid>/<gi>/<ci>``). A MIG device is selected only when it is named there, and at most one, because CUDA
shows a process only one MIG device. Without a MIG entry, a GPU in MIG mode looks like a complete GPU here;
``check_gpu`` then stops the rank that got a slice of it.

Other modules start the workers (launch/), plan the memory (plan/), and read the GPU of a rank from torch
(distributed/process_group.py, which passes it to ``check_gpu``).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flare.errors import ConfigError, EnvError, nearest, one_line
from flare.gpus.nvidia_smi import Gpu
from flare.gpus.specs import name_words
from flare.index_ranges import format_ranges


@dataclass(frozen=True)
class GpuRequest:
    """The GPUs that the user requests; by default every free GPU."""

    gpu_type: str | None = (
        None  # words of the model name, or "auto"; when gpu_ids is set too, those GPUs must match it
    )
    gpu_ids: list[int] | None = None  # nvidia-smi's indices, selected in this order
    allow_busy: bool = False  # also select GPUs that another process uses


@dataclass(frozen=True)
class Skipped:
    """A GPU that was requested but is not selected."""

    gpu: Gpu
    reason: str


@dataclass(frozen=True)
class Selection:
    """The GPUs of a run, in the order of its local ranks."""

    gpus: list[Gpu]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # notes for the user, one per line

    @property
    def visible_devices(self) -> str:
        """Value for CUDA_VISIBLE_DEVICES, under CUDA_DEVICE_ORDER=PCI_BUS_ID."""
        return ",".join(gpu.uuid if gpu.mig else str(gpu.index) for gpu in self.gpus)

    def describe(self) -> list[str]:
        """Lines for the log: the selected GPUs, the skipped GPUs and why, notes."""
        lines = [describe_gpu(gpu) for gpu in self.gpus]
        lines += [f"GPU {s.gpu.index} skipped: {s.gpu.name}, {s.reason}" for s in self.skipped]
        return lines + self.notes


# --- selection ---


def select_gpus(request: GpuRequest, gpus: Sequence[Gpu], visible: str | None) -> Selection:
    """Select GPUs by a request, within the limit of CUDA_VISIBLE_DEVICES. Pure.

    The order is that of ``gpu_ids``, otherwise that of CUDA_VISIBLE_DEVICES, otherwise nvidia-smi's. Busy GPUs are
    skipped unless ``allow_busy``, even if the user named them.

    Args:
        visible: the preset CUDA_VISIBLE_DEVICES; None when unset. The empty string hides every GPU.

    Raises:
        ConfigError: the request cannot be met. The message names the problem and lists the GPUs.
    """
    allowed, notes = visible_gpus(gpus, visible)
    found = f"GPUs found: {list_gpus(gpu for gpu in gpus if not gpu.mig) or 'none'}"
    if visible is not None:
        found += f"; CUDA_VISIBLE_DEVICES={one_line(visible)!r} allows {list_gpus(allowed) or 'none'}"
    if not allowed:
        why = notes[0] if notes else "CUDA_VISIBLE_DEVICES hides every GPU" if gpus else "no GPU here"
        raise ConfigError(f"no GPU to choose from: {why}; {found}")
    if request.gpu_ids is not None:
        wanted = _gpus_of_ids(request, gpus, allowed, found)
    else:
        wanted = _gpus_of_type(request.gpu_type, allowed, found)
    busy = [] if request.allow_busy else [gpu for gpu in wanted if gpu.is_busy]
    skipped = [Skipped(gpu, f"{_busy_reason(gpu)}; --allow_busy_gpus takes it") for gpu in busy]
    chosen = [gpu for gpu in wanted if gpu not in busy]
    if not chosen:
        which = format_ranges(g.index for g in wanted)
        raise ConfigError(f"every requested GPU ({which}) is busy; --allow_busy_gpus takes busy GPUs; {found}")
    if chosen[0].mig:  # source: CUDA C++ Programming Guide, CUDA_VISIBLE_DEVICES: one MIG instance
        skipped += [Skipped(g, "CUDA shows a process one MIG device, the first") for g in chosen[1:]]
        chosen = chosen[:1]
    for gpu in chosen:
        if gpu.is_busy:
            notes.append(f"GPU {gpu.index} is used although {_busy_reason(gpu)} (--allow_busy_gpus)")
        elif gpu.memory_used_mib is None and not gpu.mig:
            notes.append(f"GPU {gpu.index}: nvidia-smi does not report its memory use; it counts as free")
    return Selection(chosen, skipped, notes)


def visible_gpus(gpus: Sequence[Gpu], visible: str | None) -> tuple[list[Gpu], list[str]]:
    """(GPUs that CUDA_VISIBLE_DEVICES allows, in its order; notes for the user).

    It is read as CUDA reads it: the first entry decides between indices, GPU UUIDs and MIG UUIDs; reading stops at the
    first entry that does not name such a GPU; a GPU that is named twice hides all. A test compares this with torch.
    """
    if visible is None:
        return [gpu for gpu in gpus if not gpu.mig], []
    entries = [entry.strip() for entry in visible.split(",")]
    kind = next((prefix for prefix in ("GPU-", "MIG-") if entries[0].startswith(prefix)), "")
    allowed: list[Gpu] = []
    for entry in entries:
        gpu = _find_visible(entry, kind, gpus)
        if gpu is None:
            if entry in ("", "-1"):  # the usual ways to end the list
                return allowed, []
            return allowed, [f"CUDA_VISIBLE_DEVICES is read up to {one_line(entry)!r}, which names no GPU here"]
        if gpu in allowed:
            return [], [f"CUDA_VISIBLE_DEVICES names GPU {gpu.index} twice, which hides every GPU"]
        allowed.append(gpu)
    return allowed, []


def _find_visible(entry: str, kind: str, gpus: Sequence[Gpu]) -> Gpu | None:
    """The GPU that an entry of CUDA_VISIBLE_DEVICES names; ``kind`` is its prefix, "" for indices."""
    if kind:
        named = [g for g in gpus if g.mig == (kind == "MIG-") and g.uuid.startswith(entry)]
        return named[0] if entry.startswith(kind) and len(named) == 1 else None
    number = re.match(r"\+?0*([0-9]+)", entry)  # CUDA uses strtoul: "1gpu" is 1, "01" too
    return next((g for g in gpus if number and not g.mig and str(g.index) == number[1]), None)


def _gpus_of_ids(request: GpuRequest, gpus: Sequence[Gpu], allowed: Sequence[Gpu], found: str) -> list[Gpu]:
    """The allowed GPUs with these indices, in this order. Raises ConfigError when one is unknown or not allowed."""
    ids = request.gpu_ids or []
    _check_ids(ids, f"--gpu_ids {','.join(map(str, ids))}", found)
    unknown = [i for i in ids if all(i != gpu.index for gpu in gpus)]
    if unknown:
        verb = "does not exist" if len(unknown) == 1 else "do not exist"
        raise ConfigError(f"GPU {format_ranges(unknown)} {verb}; {found}")
    hidden = [i for i in ids if all(i != gpu.index for gpu in allowed)]
    if hidden:
        raise ConfigError(f"GPU {format_ranges(hidden)} is outside CUDA_VISIBLE_DEVICES; {found}")
    wanted = [gpu for i in ids for gpu in allowed if gpu.index == i]
    if request.gpu_type is not None:
        matching = _gpus_of_type(request.gpu_type, allowed, found)
        wrong = format_ranges(gpu.index for gpu in wanted if gpu not in matching)
        if wrong:
            raise ConfigError(f"GPU {wrong} of --gpu_ids does not match --gpu_type {request.gpu_type!r}; {found}")
    return wanted


def _gpus_of_type(gpu_type: str | None, allowed: Sequence[Gpu], found: str) -> list[Gpu]:
    """The allowed GPUs whose name has every word of ``gpu_type``; all for None and "auto"."""
    if gpu_type is None or gpu_type.strip().casefold() == "auto":
        return list(allowed)
    words = name_words(gpu_type)
    if not words:
        raise ConfigError(f"--gpu_type {one_line(gpu_type)!r} is not a model name; give one, or auto; {found}")
    gpus = [gpu for gpu in allowed if words <= name_words(gpu.name)]
    if not gpus:
        known = {word.upper() for gpu in allowed for word in name_words(gpu.name)}
        hint = nearest(one_line(gpu_type).upper(), sorted(known))
        raise ConfigError(f"no GPU is a {one_line(gpu_type)!r} (--gpu_type); {found}{hint}")
    return gpus


def _busy_reason(gpu: Gpu) -> str:
    return f"busy: {format_gib(gpu.memory_used_mib)} of {format_gib(gpu.memory_total_mib)} memory in use by others"


# --- indices and names as text ---


def parse_gpu_ids(value: str | int | Sequence[str | int], flag: str = "--gpu_ids") -> list[int]:
    """Indices from "0,1,2,3", "0-3", "0 1 4 5", or a list of such pieces. Errors name ``flag``.

    Raises:
        ConfigError: the list is empty, or a piece is not a number, negative, a reversed range, or a duplicate.
    """
    pieces = [str(piece) for piece in (value if isinstance(value, (list, tuple)) else [value])]
    where = f"{flag} {one_line(' '.join(pieces))}".rstrip()
    ids: list[int] = []
    for piece in re.split(r"[\s,，、]+", " ".join(pieces)):
        if not piece:
            continue
        match = re.fullmatch("([0-9]{1,4})(?:-([0-9]{1,4}))?", piece)
        if not match:
            raise ConfigError(f'{flag} must be numbers like 0,1 or 0-3, got "{one_line(piece)}"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"{where}: the range {piece} is reversed; write {last}-{first}")
        ids += range(first, last + 1)
    _check_ids(ids, where)
    return ids


def _check_ids(ids: Sequence[int], where: str, ending: str = "") -> None:
    """Raise ConfigError for an empty list or a duplicate index."""
    ending = ending and f"; {ending}"
    if not ids:
        raise ConfigError(
            f"{where.strip()} is empty; give numbers like 0,1 or leave it out for every free GPU{ending}"
        )
    seen: set[int] = set()
    for index in ids:
        if index in seen:
            raise ConfigError(f"GPU {index} listed twice in {where}{ending}")
        seen.add(index)


def list_gpus(gpus: Iterable[Gpu]) -> str:
    """GPUs grouped by name: "0-3 NVIDIA A800 80GB PCIe, 4-7 NVIDIA A40"."""
    by_name: dict[str, list[int]] = {}
    for gpu in gpus:
        by_name.setdefault(gpu.name, []).append(gpu.index)
    return ", ".join(f"{format_ranges(indices)} {name}" for name, indices in by_name.items())


def describe_gpu(gpu: Gpu) -> str:
    """A GPU as one line of a log: index, name, memory, UUID."""
    memory = f"memory {format_gib(gpu.memory_total_mib)}, free {format_gib(gpu.memory_free_mib)}"
    return f"GPU {gpu.index}: {gpu.name}, {memory}, {gpu.uuid}"


def format_gib(mib: int | None) -> str:
    """MiB as text in GiB: "80.0 GiB"; "unknown" for None."""
    return "unknown" if mib is None else f"{mib / 1024:.1f} GiB"


# --- the selected GPUs in a run ---


def select_environment(selection: Selection) -> dict[str, str]:
    """The environment variables that make CUDA see these GPUs, numbered in this order."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": selection.visible_devices}


def check_gpu(planned: Gpu, name: str, uuid: str) -> None:
    """Check that a rank has the planned GPU. ``name`` and ``uuid`` are those that torch.cuda reports.

    Raises:
        EnvError: the name differs, or, unless it is a MIG device, the UUID (torch omits the "GPU-").
    """
    same_name = " ".join(name.split()).casefold() == planned.name.casefold()
    plain = uuid.removeprefix("GPU-").casefold()
    same_uuid = planned.mig or plain == planned.uuid.removeprefix("GPU-").casefold()
    if not (same_name and same_uuid):
        raise EnvError(
            f"the plan is for GPU {planned.index}, {planned.name} ({planned.uuid}), but this rank got {name} "
            f"({uuid}); was CUDA_VISIBLE_DEVICES or the GPU's MIG mode changed after the choice?"
        )
