"""How far training has come: everything a checkpoint stores besides weights and optimizer state."""

from dataclasses import asdict, dataclass, field

from flare.config.options import Options


@dataclass
class TrainState:
    """How far a stage has come. A checkpoint stores it under the key ``progress``."""

    step: int = 0
    rows: int = 0
    tokens: int = 0
    best_loss: float | None = None
    best_step: int | None = None
    evaluations_without_gain: int = 0
    history: list[dict] = field(default_factory=list)
    data_place: dict | None = None  # position in streamed data
    skipped_steps: int = 0  # steps whose loss or gradients were not finite: --skip_nonfinite
    loss_scale: float | None = None  # of the next step, in fp16
    good_steps: int = 0  # since the loss scale changed
    overflow_steps: int = 0  # steps without an update because fp16 gradients overflowed

    def as_dict(self) -> dict:
        return asdict(self)

    def add_evaluation(self, loss: float, threshold: float) -> bool:
        """Record an evaluation at this step. Returns whether it is the best so far, by more than ``threshold``."""
        gain = self.best_loss is None or loss < self.best_loss - threshold
        if gain:
            self.best_loss, self.best_step = loss, self.step
        self.evaluations_without_gain = 0 if gain else self.evaluations_without_gain + 1
        return gain

    def out_of_patience(self, options: Options) -> bool:
        """Whether early stopping ends the run here."""
        patience = options.early_stopping_patience
        return patience is not None and self.evaluations_without_gain >= patience

    def forget_best(self) -> None:
        """Start the search for the best evaluation again."""
        self.best_loss, self.best_step, self.evaluations_without_gain = None, None, 0
