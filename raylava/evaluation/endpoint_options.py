"""The options of `raylava evaluate` that let servers answer: their checks, and the endpoints that they describe."""

from dataclasses import dataclass

from raylava.errors import UserError
from raylava.evaluation.endpoints import (
    DEFAULT_CONCURRENCY,
    EndpointSource,
    RemoteEndpoints,
    find_served_model,
    parse_urls,
    read_key,
)
from raylava.models.checkpoint import legacy_scale
from raylava.models.registry import LlavaCheckpoint


@dataclass(frozen=True)
class EndpointOptions:
    """URLs of running servers, or `start_vllm`; without either, the model is loaded by raylava."""

    urls: tuple[str, ...] = ()
    served_model: str | None = None
    concurrency: int | None = None
    start_vllm: bool = False

    def validate(self, precision: str, workers: int | None, gpus_per_worker: int) -> None:
        """Refuse options that contradict each other or have no effect, without a request. Raises UserError."""
        parse_urls(self.urls)
        read_key()
        if self.urls and self.start_vllm:
            raise UserError("--start-vllm: starts servers, and --endpoint names running ones; omit one of them")
        if self.served_model and not self.urls:
            raise UserError("--served-model applies to running servers only; add --endpoint URL")
        if self.concurrency is not None and not (self.urls or self.start_vllm):
            raise UserError("--concurrency applies to servers only; add --endpoint URL or --start-vllm")
        if self.concurrency is not None and self.concurrency < 1:
            raise UserError(f"--concurrency {self.concurrency}: must be at least 1")
        if self.start_vllm and not gpus_per_worker:
            raise UserError("--start-vllm: vLLM needs a GPU; add --gpus-per-worker 1")
        if self.urls and (workers is not None or gpus_per_worker):
            raise UserError("--workers, --gpus-per-worker: with --endpoint, no model is loaded; omit them")
        if self.urls and precision != "auto":
            raise UserError(f"--precision {precision}: with --endpoint, the server determines it; omit the option")

    def find_endpoints(self, model: LlavaCheckpoint) -> EndpointSource | None:
        """Return the endpoints of valid options, None without any; asks running servers which model they serve.

        Raises UserError for a checkpoint of transformers before 5.4, which vLLM would load without converting it.
        """
        concurrency = self.concurrency or DEFAULT_CONCURRENCY
        if self.start_vllm:
            from raylava.evaluation.vllm_server import VllmServers  # imports Ray

            if legacy_scale(model) != 1.0:
                raise UserError(f"--start-vllm: {model.name} was saved by an old transformers; omit the option")
            return VllmServers(concurrency=concurrency)
        urls = parse_urls(self.urls)
        return RemoteEndpoints(find_served_model(urls, self.served_model), concurrency, urls) if urls else None
