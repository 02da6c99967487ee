"""Linear classifiers on disk: saved while they are trained, taken up again, or published ones."""

from pathlib import Path

from ..errors import CheckpointError
from ..nets.weights import read_weights
from ..run import checkpoint
from .linear_classifiers import LinearClassifiers, ManySGD

# What settings of the first versions, which did not name them, were.
EARLIER = {"momentum": 0.9, "conv_pooling": "max", "tencrops": False, "split": "train"}


class Probe:
    """The classifiers, their optimizer and results, and the folder that keeps them.

    settings: all that the result depends on; a folder with others is not continued.
    """

    def __init__(
        self, classifiers: LinearClassifiers, optimizer: ManySGD, folder: str | Path, settings: dict
    ):
        self.classifiers, self.optimizer = classifiers, optimizer
        self.folder, self.settings = Path(folder), settings
        self.history = []  # results by epoch, see accuracies

    def save(self, epoch: int, samples_done: int) -> None:
        """Save to the folder's checkpoint.pth; all processes call it, one writes."""
        state = {
            "state_dict": self.classifiers.state_dict(),
            "momentum": self.optimizer.momentum,
            "epoch": epoch,
            "samples_done": samples_done,  # of the epoch
            "history": self.history,
            "settings": self.settings,
        }
        checkpoint.save_together(self.folder, state)

    def resume(self, start: tuple[int, int] = (0, 0)) -> tuple[int, int]:
        """Take over what the folder holds: (epoch, samples of it done) to go on from.

        start: the same where it holds nothing. Raises CheckpointError if that was made with other
        settings.
        """
        state = begun(self.folder, self.settings)
        if state is None:
            return start
        checkpoint.load_state(self.classifiers, state["state_dict"], self.folder)
        for name, momentum in self.optimizer.momentum.items():
            momentum.copy_(state["momentum"][name])
        self.history = state["history"]
        return state["epoch"], state["samples_done"]


def begun(folder: str | Path, settings: dict, counted_by: str = "epoch") -> dict | None:
    """The state of a training that a folder holds, the same on all processes, which call it; None of none.

    counted_by: what the state counts, "epoch", with the "samples_done" of the next, or "iteration". Raises
    CheckpointError if it was made with other settings, or is not the same for all.
    """
    state = checkpoint.load_checkpoint(folder)
    epoch, samples_done = (state[counted_by], state.get("samples_done", 0)) if state else (-1, 0)
    checkpoint.check_same_place(epoch, samples_done, folder)
    if state is not None:
        check_settings(state, settings, folder)
    return state


def check_settings(state: dict, settings: dict, folder: str | Path) -> None:
    """Raise CheckpointError if one of `settings` differs in the checkpoint `state` of `folder`."""
    for name, value in settings.items():
        before = state["settings"].get(name, EARLIER.get(name))
        if before != value:
            raise CheckpointError(
                f"{folder} holds an evaluation with {name} {before}, not {value}: use another "
                "--dump_path, or remove that folder to start afresh"
            )


def saved_classifiers(
    weights: str | None, folder: str | Path, settings: dict, dim: int, num_classes: int
) -> tuple[LinearClassifiers, list[float | None], int | None]:
    """Classifiers to evaluate, their learning rates and the epochs they were trained for.

    weights: a file of published linear weights, whose rate and epochs are None; without it, what
    `folder` holds, which must be for features with these settings. dim, num_classes: what they have
    to fit. Raises FileNotFoundError, ValueError and CheckpointError.
    """
    if weights:
        tensors, lrs, epoch, source = read_weights(weights), [None], None, weights
    else:
        state, source = checkpoint.load_checkpoint(folder), folder
        if state is None:
            raise FileNotFoundError(
                f"--evaluate: {folder} holds no classifier: train one by leaving --evaluate out, or "
                "name one by --linear_weights"
            )
        check_settings(state, settings, folder)
        tensors, lrs, epoch = state["state_dict"], state["settings"]["lrs"], state["epoch"]
    if not {"linear.weight", "linear.bias"} <= tensors.keys():
        raise ValueError(
            f"--linear_weights {source} has no linear.weight and linear.bias but "
            f"{', '.join(list(tensors)[:4])}: give the weights of a linear classifier"
        )
    if tensors["linear.weight"].ndim == 2:
        names = ("linear.weight", "linear.bias", "bn.weight", "bn.bias")
        tensors = {name: x[None] if name in names else x for name, x in tensors.items()}
    tensors = {name: x for name, x in tensors.items() if not name.endswith("num_batches_tracked")}
    num, classes, features = tensors["linear.weight"].shape
    if (features, classes) != (dim, num_classes):
        raise ValueError(
            f"{source} maps {features} features to {classes} classes, and here are {dim} and "
            f"{num_classes}: check --arch, --conv, --n_last_blocks, --avgpool_patchtokens, "
            "--global_pooling and the data"
        )
    channels = tensors["bn.weight"].shape[1] if "bn.weight" in tensors else 0
    classifiers = LinearClassifiers(num, dim, num_classes, channels)
    checkpoint.load_state(classifiers, tensors, source)
    return classifiers, lrs, epoch
