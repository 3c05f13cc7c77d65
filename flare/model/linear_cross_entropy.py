"""lm_head and cross-entropy without the full logits.

Qwen's vocabulary has 151,936 entries: fp32 logits of 16,384 tokens take 9.3 GiB, and so does their gradient. Both
functions here process the rows in chunks and keep the logits of one chunk at a time.
"""

import torch
import torch.nn.functional as F

from flare.data.training_rows import IGNORE_INDEX
from flare.plan.loss_chunks import CPU_BLOCK_ROWS, cpu_softmax_rows, loss_chunk_rows

FP16_FOLD = 2.0**15
"""The logits' gradient is multiplied by this while it is in fp16, whose smallest normal number is 6.1e-5 and largest
65,504: its numbers are in [-1, 1], and a probability of 1 / 151,936 is 6.6e-6. From 1.9e-9 on no digit is lost."""

SCALED_ROWS = 1024


def linear_cross_entropy_sum(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int | None = None
) -> torch.Tensor:
    """Sum of token NLLs (nats) of ``softmax(hidden @ weight.T)``, differentiable once, in fp32.

    Args:
        hidden: (N, H) final hidden states in any float dtype, which is also that of the logits. In fp16 the gradient
            of the logits is kept multiplied by ``FP16_FOLD``, and its products are computed in fp32.
        weight: (V, H) in any float dtype. The gradient of an fp32 master is summed and returned in fp32.
        labels: (N,) int64 targets, already shifted; ``IGNORE_INDEX`` marks positions without one.
        chunk_rows: rows per chunk.

    A frozen ``weight`` (``requires_grad=False``) gets no gradient and costs none.
    """
    chunk_rows = chunk_rows or loss_chunk_rows(len(weight), hidden.is_cuda)
    return _LinearCrossEntropySum.apply(hidden, weight, labels, chunk_rows)


class _LinearCrossEntropySum(torch.autograd.Function):
    """Computes the gradients in the forward pass, while a chunk's logits exist: three matmuls, none twice.

    torch 2.13's ``linear_cross_entropy`` does the same, but torch 2.11 lacks it, and its backward pass allocates zeros
    as large as both gradients. Checkpointed chunks need a fourth matmul and sum a bf16 weight gradient in bf16.
    Numbers: docs/experiments.md. Source of the idea: Liger-Kernel.
    """

    @staticmethod
    def forward(ctx, hidden, weight, labels, chunk_rows):
        head = weight.to(hidden.dtype)
        fp16 = hidden.dtype == torch.float16
        wide = torch.float32 if fp16 else hidden.dtype  # backward may scale up what is too small for fp16 here
        hidden_grad = torch.empty_like(hidden, dtype=wide) if ctx.needs_input_grad[0] else None
        weight_grad = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        chunk_gradient = gradient_of_chunk if hidden.is_cuda else InPlaceGradient(min(chunk_rows, len(hidden)), head)
        total = hidden.new_zeros((), dtype=torch.float32)
        for first in range(0, len(hidden), chunk_rows):
            chunk = slice(first, first + chunk_rows)
            rows = hidden[chunk]
            nll, logits_grad = chunk_gradient(rows, head, labels[chunk])
            total += nll
            if weight_grad is not None:
                _add_product(weight_grad, logits_grad.T, rows)
            if hidden_grad is not None:
                if fp16:
                    hidden_grad[chunk] = _fp32_product(logits_grad, head)
                else:
                    torch.mm(logits_grad, head, out=hidden_grad[chunk])
            del logits_grad  # freed before the next chunk's logits are allocated
        ctx.gradients = (hidden_grad, weight_grad)
        ctx.dtypes = (hidden.dtype, weight.dtype)
        return total

    @staticmethod
    def backward(ctx, scale):
        if ctx.gradients is None:
            raise RuntimeError("a second backward pass through the loss: the first one has returned its gradients")
        (hidden_grad, weight_grad), ctx.gradients = ctx.gradients, None
        hidden_dtype, weight_dtype = ctx.dtypes
        if hidden_dtype == torch.float16:
            scale = scale / FP16_FOLD
        if hidden_grad is not None:
            hidden_grad = _scaled(hidden_grad, scale).to(hidden_dtype)
        if weight_grad is not None:
            weight_grad = weight_grad.mul_(scale).to(weight_dtype)
        return hidden_grad, weight_grad, None, None


def _scaled(gradient: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Multiply a (N, H) gradient in place, some rows at a time in fp32.

    Without fp32, a GPU first rounds the scale to the gradient's dtype. In bf16 all numbers are then up to 0.2 % off.
    """
    for rows in gradient.split(SCALED_ROWS):
        rows.copy_(rows.float().mul_(scale))
    return gradient


def gradient_of_chunk(
    rows: torch.Tensor, head: torch.Tensor, labels: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(sum of NLLs, its gradient with respect to the logits (C, V)).

    The gradient is softmax minus one-hot, in the dtype of ``rows``; in fp16 multiplied by ``FP16_FOLD``. A GPU's
    kernels cast while they compute, so only one fp32 copy exists next to the bf16 logits, which the gradient
    overwrites. ``log_softmax`` with ``dtype=float32`` would make two copies: its kernel casts only from fp16.
    """
    logits = rows @ head.T
    wanted, targets = _targets(labels)
    largest = logits.amax(1, keepdim=True).float()
    at_target = logits.gather(1, targets).float()
    exponentials = (logits - largest).exp_()
    sums = exponentials.sum(1, keepdim=True)
    nll = sums.log() + largest - at_target
    ones = wanted * _fold(logits.dtype)
    share = ones / sums
    gradient = torch.mul(exponentials, share, out=logits)
    # Subtracted before the rounding: near 1 a bf16 probability has two digits.
    gradient.scatter_(1, targets, (exponentials.gather(1, targets) * share - ones).to(logits.dtype))
    return torch.where(wanted, nll, 0).sum(), gradient


class InPlaceGradient:
    """``gradient_of_chunk`` on a CPU, where allocating and reading memory takes longer than computing: all chunks
    share one buffer, and the gradient is computed from a few rows at a time while they are in the cache."""

    def __init__(self, chunk_rows: int, head: torch.Tensor) -> None:
        self.logits = head.new_empty(chunk_rows, len(head))
        wide = head.dtype != torch.float32
        self.block_rows = min(cpu_softmax_rows(len(head)), chunk_rows)
        self.wide = torch.empty(self.block_rows, len(head)) if wide else None

    def __call__(
        self, rows: torch.Tensor, head: torch.Tensor, labels: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        logits = torch.mm(rows, head.T, out=self.logits[: len(rows)])
        wanted, targets = _targets(labels)
        blocks = (tensor.split(self.block_rows) for tensor in (logits, wanted, targets))
        return sum(self._block(*block) for block in zip(*blocks, strict=True)), logits

    def _block(self, logits: torch.Tensor, wanted: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Sum of NLLs; overwrites ``logits`` with the gradient."""
        wide = logits if self.wide is None else self.wide[: len(logits)].copy_(logits)
        at_target, largest = wide.gather(1, targets), wide.amax(1, keepdim=True)
        torch.softmax(wide, 1, out=wide)
        nll = largest - at_target - wide.amax(1, keepdim=True).log()  # the largest probability is 1 / sum(exp)
        wide.scatter_add_(1, targets, torch.full_like(at_target, -1))
        if not wanted.all():
            wide.mul_(wanted)
        if wide is not logits:
            logits.copy_(wide.mul_(FP16_FOLD) if logits.dtype == torch.float16 else wide)
        return torch.where(wanted, nll, 0).sum()


def _add_product(total: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> None:
    """Add ``left @ right`` to an fp32 ``total``. A bf16 product runs on tensor cores or AMX and is rounded to bf16."""
    if left.dtype == total.dtype:
        torch.addmm(total, left, right, out=total)
        return
    fp16 = left.dtype == torch.float16
    if left.is_cuda:
        block = -(-len(left) // 2) if fp16 else len(left)  # a half in fp32 takes the memory of the whole in bf16
    else:
        block = CPU_BLOCK_ROWS  # a CPU adds an fp32 copy of the product, which for one block fits in the cache
    for part, rows in zip(total.split(block), left.split(block), strict=True):
        part += _fp32_product(rows, right) if fp16 else rows @ right


def _fp32_product(left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """``left @ right`` of fp16 operands, in fp32: a sum over many rows may exceed what fp16 holds.

    On a CPU a product has the dtype of its operands, so blocks of the operands are converted.
    """
    if left.is_cuda:
        return torch.mm(left, right, out_dtype=torch.float32)
    total = torch.zeros(len(left), right.shape[1])
    for columns, rows in zip(left.split(CPU_BLOCK_ROWS, 1), right.split(CPU_BLOCK_ROWS), strict=True):
        total.addmm_(columns.float(), rows.float())
    return total


def _fold(dtype: torch.dtype) -> float:
    return FP16_FOLD if dtype == torch.float16 else 1.0


def _targets(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(whether each row has a target, the targets with 0 for rows without one), (C, 1) each."""
    wanted = (labels != IGNORE_INDEX)[:, None]
    return wanted, torch.where(wanted, labels[:, None], 0)


@torch.no_grad()
def score_tokens(
    hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor, chunk_rows: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """NLL of every target and whether it is the argmax, for evaluation.

    Args: as in ``linear_cross_entropy_sum``.
    Returns: ((N,) fp32 NLL in nats, 0 where the label is ``IGNORE_INDEX``; (N,) bool, False there).
    """
    chunk_rows = chunk_rows or loss_chunk_rows(len(weight), hidden.is_cuda)
    weight = weight.to(hidden.dtype)
    score = _score_rows if hidden.is_cuda else _score_rows_in_place
    # On a CPU allocating memory takes longer than computing: all chunks share one buffer.
    buffer = None if hidden.is_cuda else hidden.new_empty(min(chunk_rows, len(hidden)), len(weight))
    losses, hits = [], []
    for rows, targets in zip(hidden.split(chunk_rows), labels.split(chunk_rows), strict=True):
        logits = torch.mm(rows, weight.T, out=None if buffer is None else buffer[: len(rows)])
        nll, hit = score(logits.float(), targets)
        losses.append(nll)
        hits.append(hit)
    return torch.cat(losses), torch.cat(hits)


def _score_rows(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(NLL, hits) of a chunk, (C,) each."""
    losses = F.cross_entropy(logits, targets, reduction="none", ignore_index=IGNORE_INDEX)
    return losses, logits.argmax(-1) == targets


def _score_rows_in_place(logits: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """``_score_rows``, overwriting ``logits``. Only rows whose target has the highest logit need the
    argmax, which on a CPU takes as long as the exponentials."""
    wanted = targets != IGNORE_INDEX
    safe = torch.where(wanted, targets, 0)
    at_target, largest = logits.gather(1, safe[:, None])[:, 0], logits.amax(1)
    hits = wanted & (at_target == largest)
    highest = hits.nonzero()[:, 0]
    hits[highest] = logits[highest].argmax(1) == safe[highest]  # of several equal maxima the first one counts
    nll = logits.sub_(largest[:, None]).exp_().sum(1).log_() + largest - at_target
    return torch.where(wanted, nll, 0), hits
