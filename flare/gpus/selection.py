"""Which GPUs this machine has, and which of them a run takes. Standard library only.

``query_gpus`` (nvidia_smi.py) finds the GPUs; ``select_gpus`` is a pure choice among them, by words of the
model's name, by nvidia-smi's index, or all. The shell launcher, the Python script and
``python -m flare.gpus`` (__main__.py) use this code, before torch is imported.

A preset ``CUDA_VISIBLE_DEVICES`` (a scheduler's) is a limit. Understood in it, as CUDA does: indices, taken
in nvidia-smi's (PCI) order; GPU UUIDs and unique beginnings of them; MIG device UUIDs (``MIG-<uuid>`` and
the older ``MIG-GPU-<uuid>/<gi>/<ci>``). MIG devices are taken only when they are named there, and one at
most: CUDA shows a process one MIG device. Without a MIG entry a GPU in MIG mode looks like a whole GPU
here; ``check_gpu`` then stops the rank that got a slice of it.

Left to others: starting workers (launch.py), what fits into the memory (plan.py), and asking torch for the
GPU that a rank got (distributed.py, which hands it to ``check_gpu``).
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from flare.errors import ConfigError, EnvError, nearest, one_line
from flare.gpus.nvidia_smi import Gpu
from flare.gpus.specs import name_words


@dataclass(frozen=True)
class GpuRequest:
    """What the user asked for; with nothing given, every free GPU."""

    gpu_type: str | None = None  # words of the model name, or "auto"; given with gpu_ids, those must match it
    gpu_ids: list[int] | None = None  # nvidia-smi's indices, taken in this order
    allow_busy: bool = False  # take GPUs that another process holds


@dataclass(frozen=True)
class Skipped:
    """A GPU that was asked for and is not taken."""

    gpu: Gpu
    reason: str


@dataclass(frozen=True)
class Selection:
    """The GPUs of a run, in the order of its local ranks."""

    gpus: list[Gpu]
    skipped: list[Skipped] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # remarks for the user, a line each

    @property
    def visible_devices(self) -> str:
        """Value for CUDA_VISIBLE_DEVICES, under CUDA_DEVICE_ORDER=PCI_BUS_ID."""
        return ",".join(gpu.uuid if gpu.mig else str(gpu.index) for gpu in self.gpus)

    def describe(self) -> list[str]:
        """Lines for a log: the GPUs taken, the GPUs skipped and why, remarks."""
        lines = [gpu_line(gpu) for gpu in self.gpus]
        lines += [f"GPU {s.gpu.index} skipped: {s.gpu.name}, {s.reason}" for s in self.skipped]
        return lines + self.notes


# --- choosing ---


def select_gpus(request: GpuRequest, gpus: Sequence[Gpu], visible: str | None) -> Selection:
    """The GPUs that ``request`` gets of ``gpus`` inside the limit ``visible``. Pure.

    The order is that of ``gpu_ids``, else that of CUDA_VISIBLE_DEVICES, else nvidia-smi's. Busy GPUs are
    skipped, explicitly named ones too, unless ``allow_busy``.

    Args:
        visible: a preset CUDA_VISIBLE_DEVICES, None when unset; the empty string hides every GPU.

    Raises:
        ConfigError: the request cannot be met; names the problem and lists the GPUs.
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
        which = list_indices(g.index for g in wanted)
        raise ConfigError(f"every GPU asked for ({which}) is busy; --allow_busy_gpus takes busy GPUs; {found}")
    if chosen[0].mig:  # source: CUDA C++ Programming Guide, CUDA_VISIBLE_DEVICES: one MIG instance
        skipped += [Skipped(g, "CUDA shows a process one MIG device, the first") for g in chosen[1:]]
        chosen = chosen[:1]
    for gpu in chosen:
        if gpu.is_busy:
            notes.append(f"GPU {gpu.index} is taken though {_busy_reason(gpu)} (--allow_busy_gpus)")
        elif gpu.memory_used_mib is None and not gpu.mig:
            notes.append(f"GPU {gpu.index}: nvidia-smi does not tell its memory use; taken as free")
    return Selection(chosen, skipped, notes)


def visible_gpus(gpus: Sequence[Gpu], visible: str | None) -> tuple[list[Gpu], list[str]]:
    """The GPUs that CUDA_VISIBLE_DEVICES leaves, in its order, and remarks on what it does.

    As CUDA reads it: the first entry decides between indices, GPU and MIG UUIDs; reading stops at the first
    entry that is no such GPU; a GPU named twice hides all. Compared with torch's reading in the tests.
    """
    if visible is None:
        return [gpu for gpu in gpus if not gpu.mig], []
    entries = [entry.strip() for entry in visible.split(",")]
    kind = next((prefix for prefix in ("GPU-", "MIG-") if entries[0].startswith(prefix)), "")
    allowed: list[Gpu] = []
    for entry in entries:
        gpu = _find_visible(entry, kind, gpus)
        if gpu is None:
            if entry in ("", "-1"):  # the usual ways to say "no more"
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
    """The allowed GPUs with these indices, in this order, or the ConfigError that says what is wrong."""
    ids = request.gpu_ids or []
    _check_ids(ids, f"--gpu_ids {','.join(map(str, ids))}", found)
    unknown = [i for i in ids if all(i != gpu.index for gpu in gpus)]
    if unknown:
        verb = "does not exist" if len(unknown) == 1 else "do not exist"
        raise ConfigError(f"GPU {list_indices(unknown)} {verb}; {found}")
    hidden = [i for i in ids if all(i != gpu.index for gpu in allowed)]
    if hidden:
        raise ConfigError(f"GPU {list_indices(hidden)} is outside CUDA_VISIBLE_DEVICES; {found}")
    wanted = [gpu for i in ids for gpu in allowed if gpu.index == i]
    if request.gpu_type is not None:
        right = _gpus_of_type(request.gpu_type, allowed, found)
        wrong = list_indices(gpu.index for gpu in wanted if gpu not in right)
        if wrong:
            raise ConfigError(f"GPU {wrong} of --gpu_ids is no {request.gpu_type!r} (--gpu_type); {found}")
    return wanted


def _gpus_of_type(gpu_type: str | None, allowed: Sequence[Gpu], found: str) -> list[Gpu]:
    """The allowed GPUs whose name has every word of ``gpu_type``; all for None and "auto"."""
    if gpu_type is None or gpu_type.strip().casefold() == "auto":
        return list(allowed)
    words = name_words(gpu_type)
    if not words:
        raise ConfigError(f"--gpu_type {one_line(gpu_type)!r} is no model name; give one or auto; {found}")
    gpus = [gpu for gpu in allowed if words <= name_words(gpu.name)]
    if not gpus:
        known = {word.upper() for gpu in allowed for word in name_words(gpu.name)}
        hint = nearest(one_line(gpu_type).upper(), sorted(known))
        raise ConfigError(f"no GPU is a {one_line(gpu_type)!r} (--gpu_type); {found}{hint}")
    return gpus


def _busy_reason(gpu: Gpu) -> str:
    return f"busy: {gib(gpu.memory_used_mib)} of {gib(gpu.memory_total_mib)} memory in use by others"


# --- what people type and read ---


def parse_gpu_ids(value: str | int | Sequence[str | int], flag: str = "--gpu_ids") -> list[int]:
    """Indices from "0,1,2,3", "0-3", "0 1 4 5", or a list of such pieces. ``flag`` is named in errors.

    Raises:
        ConfigError: empty, not a number, negative, a reversed range, or an index twice.
    """
    pieces = [str(piece) for piece in (value if isinstance(value, (list, tuple)) else [value])]
    where = f"{flag} {one_line(' '.join(pieces))}".rstrip()
    ids: list[int] = []
    for piece in re.split(r"[\s,，、]+", " ".join(pieces)):
        if not piece:
            continue
        match = re.fullmatch("([0-9]{1,4})(?:-([0-9]{1,4}))?", piece)
        if not match:
            raise ConfigError(f'{flag} wants numbers like 0,1 or 0-3, got "{one_line(piece)}"')
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ConfigError(f"{where}: the range {piece} is reversed; write {last}-{first}")
        ids += range(first, last + 1)
    _check_ids(ids, where)
    return ids


def _check_ids(ids: Sequence[int], where: str, ending: str = "") -> None:
    """ConfigError for an empty list or an index that is listed twice."""
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
    """ "0-3 NVIDIA A800 80GB PCIe, 4-7 NVIDIA A40"."""
    by_name: dict[str, list[int]] = {}
    for gpu in gpus:
        by_name.setdefault(gpu.name, []).append(gpu.index)
    return ", ".join(f"{list_indices(indices)} {name}" for name, indices in by_name.items())


def list_indices(indices: Iterable[int]) -> str:
    """ "0-3,5" for 0, 1, 2, 3 and 5, in any order."""
    runs: list[list[int]] = []
    for index in sorted(set(indices)):
        if runs and index == runs[-1][-1] + 1:
            runs[-1].append(index)
        else:
            runs.append([index])
    return ",".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def gpu_line(gpu: Gpu) -> str:
    """A GPU as logs have it: index, name, memory, UUID."""
    memory = f"memory {gib(gpu.memory_total_mib)}, free {gib(gpu.memory_free_mib)}"
    return f"GPU {gpu.index}: {gpu.name}, {memory}, {gpu.uuid}"


def gib(mib: int | None) -> str:
    """ "80.0 GiB", or "unknown"."""
    return "unknown" if mib is None else f"{mib / 1024:.1f} GiB"


# --- what a run does with its GPUs ---


def select_environment(selection: Selection) -> dict[str, str]:
    """What makes CUDA see these GPUs, numbered in this order."""
    return {"CUDA_DEVICE_ORDER": "PCI_BUS_ID", "CUDA_VISIBLE_DEVICES": selection.visible_devices}


def check_gpu(planned: Gpu, name: str, uuid: str) -> None:
    """Is the GPU that a rank got the planned one? ``name`` and ``uuid`` as torch.cuda tells them.

    Raises:
        EnvError: another name or, for a whole GPU, another UUID (torch leaves out the "GPU-").
    """
    same_name = " ".join(name.split()).casefold() == planned.name.casefold()
    plain = uuid.removeprefix("GPU-").casefold()
    same_uuid = planned.mig or plain == planned.uuid.removeprefix("GPU-").casefold()
    if not (same_name and same_uuid):
        raise EnvError(
            f"the plan is for GPU {planned.index}, {planned.name} ({planned.uuid}), but this rank got {name} "
            f"({uuid}); was CUDA_VISIBLE_DEVICES or the GPU's MIG mode changed after the choice?"
        )
