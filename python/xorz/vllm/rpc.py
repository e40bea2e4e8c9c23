"""What workers are asked about updates of their words, by `client` and by vLLM's engine; see `sync`."""

import functools
from typing import Any


def install() -> None:
    """Make vLLM know the weight transfer `xorz`, once, and its workers the methods below."""
    from vllm.distributed.weight_transfer.factory import (
        WeightTransferEngineFactory,
        WeightTransferTrainerFactory,
    )
    from vllm.v1.worker.gpu_worker import Worker
    from vllm.v1.worker.worker_base import WorkerBase

    if "xorz" not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine("xorz", "xorz.vllm.sync", "XorzWeightTransferEngine")
    if "xorz" not in WeightTransferTrainerFactory._registry:
        WeightTransferTrainerFactory.register_engine(
            "xorz", "xorz.vllm.trainer", "XorzTrainerWeightTransferEngine"
        )
    Worker.start_weight_update = _starting(Worker.start_weight_update)
    WorkerBase.xorz_version = _version
    WorkerBase.xorz_sync_report = _sync_report
    WorkerBase.xorz_sync_prepare = _sync_prepare
    WorkerBase.xorz_sync_prepared = _sync_prepared
    WorkerBase.xorz_sync_abort = _sync_abort


def _sync(worker: Any) -> Any:
    engine = getattr(worker, "weight_transfer_engine", None)
    if not hasattr(engine, "took_back"):
        raise RuntimeError(
            """xorz: the engine was not started with --weight-transfer-config '{"backend": "xorz"}'"""
        )
    return engine


def _starting(plain: Any) -> Any:
    """A trainer that was killed in the middle of an update must not lock out the next one: nothing had changed."""

    @functools.wraps(plain)
    def start_weight_update(self: Any) -> None:
        engine = getattr(self, "weight_transfer_engine", None)
        if hasattr(engine, "took_back") and self._weight_update_active:
            self._weight_update_active = False
            engine.reset_weight_update_target()
        plain(self)

    return start_weight_update


def _version(self: Any) -> str:
    """Of every worker: what the words that it serves are called."""
    return _sync(self).version


def _sync_report(self: Any) -> dict[str, Any] | None:
    """Of every worker: see `sync.Report`; None before the first update."""
    report = _sync(self).report
    return None if report is None else dict(vars(report))


def _sync_prepare(self: Any, update_info: dict[str, Any]) -> bool:
    """Of every worker: see `XorzWeightTransferEngine.prepare`."""
    return _sync(self).prepare(update_info)


def _sync_prepared(self: Any) -> str | None:
    """Of every worker: see `XorzWeightTransferEngine.prepared`."""
    return _sync(self).prepared()


def _sync_abort(self: Any) -> None:
    """Of every worker: forget an update that was received and not finished, and end vLLM's session."""
    engine = _sync(self)
    engine.start_weight_update()
    self._weight_update_active = False
    engine.reset_weight_update_target()
