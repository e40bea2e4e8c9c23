"""vLLM's trainer half of the weight transfer `xorz`: versions from a `WeightSource`, to engines behind any of vLLM's clients.

    trainer = WeightTransferTrainerFactory.trainer_init(
        XorzTrainerInitInfo("base/", "/shared/run", rank=rank), client=HTTPVLLMWeightSyncClient(url), source=ModuleSource(model)
    )
    trainer.send_weights()   # on every rank, after each step

`client.update` does the same for several engines, all or none, and beside their requests; this is for trainers that are
written against vLLM's interface.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor
from vllm.distributed.weight_transfer.base import TrainerInitInfo, TrainerWeightTransferEngine

from ..publisher import Publisher


@dataclass
class XorzTrainerInitInfo(TrainerInitInfo):
    """What the trainer says once.

    Attributes:
        base: the checkpoint that the engines have loaded, as the sender sees it.
        folder: where versions are written, as the sender and the engines see it.
        keyframe: as in `xorz.Publisher`.
        keep: versions that engines keep the way back to.
        trust: as in `xorz.Publisher`; "sha256" has the engines take nothing else, too.
    """

    backend: ClassVar[str] = "xorz"

    base: str
    folder: str
    keyframe: int = 8
    keep: int = 1
    trust: str = "digest"


class XorzTrainerWeightTransferEngine(TrainerWeightTransferEngine[XorzTrainerInitInfo]):
    """Every rank iterates the source, which gathers what is sharded; the sender publishes, and drives the engines.

    Attributes:
        publisher: the sender's; None on other ranks.
        number: the version that the engines have taken last.
    """

    init_info_cls = XorzTrainerInitInfo

    def __init__(self, **kwargs: Any) -> None:
        """As vLLM's; see `trainer_init`."""
        super().__init__(**kwargs)
        self.publisher: Publisher | None = None
        self.number = 0
        self._folder = ""

    @classmethod
    def trainer_init(
        cls, init_info: XorzTrainerInitInfo, *, client: Any, source: Any = None
    ) -> "XorzTrainerWeightTransferEngine":
        """Open the chain, and make the engines ready.

        Raises:
            ValueError: there is no source; as `xorz.Publisher`.
        """
        if source is None:
            raise ValueError(
                "xorz: the trainer's engine needs a source of weights, such as ModuleSource(model)"
            )
        out = cls(client=client, source=source, is_sender=init_info.is_sender)
        if out.is_sender:
            out._folder = str(Path(init_info.folder).absolute())
            out.publisher = Publisher(
                init_info.base, out._folder, keyframe=init_info.keyframe, trust=init_info.trust
            )
            asked = {"trust": init_info.trust} if init_info.trust != "digest" else {}
            client.init_weight_transfer_engine({"keep": init_info.keep} | asked)
        return out

    def send_weights(self) -> None:
        """Publish what the source has, and bring the engines to it. On every rank.

        Where an engine refuses, the version is there all the same, and the next one is reached from the one before it.

        Raises:
            As `xorz.Publisher.publish`, and what the client raises.
        """
        state: dict[str, Tensor] = {}
        for name, tensor in self.source:
            if self.is_sender and tensor is not None:
                # What was gathered on a device must not stay there for the whole model.
                state[name] = tensor.detach().cpu()
        if self.publisher is None:
            return
        number = self.publisher.publish(state).result()
        self.client.start_weight_update()
        self.client.update_weights({"source": self._folder, "version": number})
        self.client.finish_weight_update(str(number))
        self.number = number

    def shutdown(self) -> None:
        """Close the publisher, which waits for what it writes."""
        if self.publisher is not None:
            self.publisher.close()
