"""TRL's weight transfer by packages: each sync of its asynchronous trainers becomes a version, and an update of the engines.

    transfer = XorzWeightTransfer("base/", "/shared/run", "http://host:8000")
    AsyncGRPOTrainer("base/", reward_funcs=..., args=..., train_dataset=..., weight_transfer=transfer).train()

`WeightTransferProtocol` (of `trl.experimental.async_grpo`, and of `async_distillation`) asks for five methods and for no class
of TRL's, so that nothing of TRL is imported here, nor of vLLM: engines are spoken to over HTTP, by `client`.
"""

from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from torch import Tensor

from ..checkpoint import PathLike
from ..publisher import Publisher
from . import client

PAUSES = ("abort", "wait", "keep")
"""What vLLM can do with running requests while it is paused."""


class XorzWeightTransfer:
    """What TRL calls to bring a model under training to the engines that roll it out: all of them take it, or none.

    Attributes:
        publisher: what writes the versions; None before `init_weight_transfer` and after `destroy`.
        number: the version that the engines have taken last; 0 is the base.
        reports: what each engine says of that update, as `client.update` gives it: bytes, changed words, seconds.
    """

    def __init__(
        self,
        base: PathLike,
        folder: PathLike,
        engines: str | Sequence[str],
        *,
        keyframe: int = 8,
        keep: int = 1,
        trust: str = "digest",
        pause: str | None = None,
        start: float = 600.0,
        timeout: float = 1800.0,
    ) -> None:
        """Say where things are; nothing is read or asked yet.

        Args:
            base: the checkpoint that the trainer began with and that the engines have loaded, a folder of safetensors files.
            folder: where versions are written, as the trainer and the engines see it. A chain that is there goes on.
            engines: addresses of vLLM's servers, started with VLLM_SERVER_DEV_MODE=1 and `--weight-transfer-config
                '{"backend": "xorz"}'`. TRL itself asks one address for rollouts, `vllm_server_base_url`.
            keyframe: as in `xorz.Publisher`.
            keep: versions that engines keep the way back to.
            trust: as in `xorz.Publisher`; "sha256" has the engines take nothing else, too.
            pause: what becomes of requests that run when the words change. None, the default: they go on, with the new policy,
                and others are answered while the update is read. "keep": the same, but no step is computed meanwhile (what
                TRL's own transfer does). "wait": they end first, so that none is of two policies. "abort": they end at once.
            start: seconds that an engine is waited for at the beginning.
            timeout: seconds, of each request to an engine, and of reading an update.

        Raises:
            ValueError: `pause` is another word, or no engine is named.
        """
        if pause is not None and pause not in PAUSES:
            raise ValueError(f"pause must be None or one of {', '.join(PAUSES)}, but is {pause!r}")
        self._engines = [engines] if isinstance(engines, str) else list(engines)
        if not self._engines:
            raise ValueError("engines must be the address of at least one engine, but there is none")
        self._base, self._folder = base, str(Path(folder).absolute())
        self._options: dict[str, Any] = {"keyframe": keyframe, "trust": trust}
        self._keep, self._mode, self._start, self._timeout = keep, pause, start, timeout
        self._paused = False
        self.publisher: Publisher | None = None
        self.number = 0
        self.reports: list[dict[str, Any]] = []

    def init_weight_transfer(self) -> None:
        """Open the chain of versions, and make the engines ready once they answer.

        Raises:
            As `xorz.Publisher`; UpdateError: an engine does not answer, or was not started for updates of xorz.
        """
        self._open()
        trust = self._options["trust"]
        client.init(
            self._engines,
            keep=self._keep,
            trust=trust if trust != "digest" else None,
            start=self._start,
            timeout=self._timeout,
        )

    def _open(self) -> Publisher:
        if self.publisher is None:
            self.publisher = Publisher(self._base, self._folder, **self._options)
        return self.publisher

    def pause(self) -> None:
        """What the argument `pause` says; nothing where that is None, since words change between two steps of an engine."""
        if self._mode is not None:
            client.pause(self._engines, self._mode, timeout=self._timeout)
            self._paused = True

    def send_weights(self, iterator: Iterable[tuple[str, Tensor]]) -> None:
        """Publish what the trainer has, and bring all engines to it. Where that fails all serve what they served, and go on.

        The iterator is always gone through to its end, since other ranks of the trainer gather with it.

        Raises:
            KeyError, ValueError: a tensor is missing, unknown or of another shape than the base's (named); TypeError: one is
                sharded; UpdateError: an engine has refused, or is lost. A version that an engine has refused is there all the
                same, and the next one is reached from the one before it.
        """
        try:
            state: dict[str, Tensor] = {}
            for name, tensor in iterator:
                # What was gathered on a device must not stay there for the whole model.
                state[name] = tensor.detach().cpu()
            publisher = self._open()
            publisher.publish(state)
            # Not the future's result: an error would be raised by `destroy` once more.
            number = publisher.wait()
            self.reports = client.update(self._engines, self._folder, number, timeout=self._timeout)
            self.number = number
        except BaseException:
            # TRL ends here; whoever else the engines serve should not wait for it.
            with suppress(client.UpdateError):
                self.resume()
            raise

    def resume(self) -> None:
        """Have paused engines go on. UpdateError: one is lost."""
        if self._paused:
            self._paused = False
            client.resume(self._engines, timeout=self._timeout)

    def destroy(self) -> None:
        """Close the chain; the engines go on with the version that they have. It may be called twice."""
        with suppress(client.UpdateError):
            self.resume()
        publisher, self.publisher = self.publisher, None
        if publisher is not None:
            publisher.close()
