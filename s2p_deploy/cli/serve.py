"""``s2p-deploy serve``: an engine over HTTP."""

from __future__ import annotations

import gc
import importlib
import os
import re
import sys
from contextlib import contextmanager
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from s2p_deploy.api import as_components, base_of
from s2p_deploy.cli.components import ComponentsOption
from s2p_deploy.cli.options import (
    DeviceOption,
    EngineArgument,
    JsonOption,
    ModelOption,
    PublicKeyOption,
    SchedulesOption,
    ThreadsOption,
    schedule_from_option,
)
from s2p_deploy.cli.output import Outcome, show
from s2p_deploy.context import Context
from s2p_deploy.errors import InputError, MissingEnvironmentError, ServerStoppedError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from s2p_deploy.families import BasePipeline
    from s2p_deploy.records import Engine
    from s2p_deploy.records.engine import ComponentEngines
    from s2p_deploy.serve.batching import Batching
    from s2p_deploy.serve.http.metrics import Metrics
    from s2p_deploy.serve.service import ImageService, ServiceSettings

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
_PACKAGES = ("fastapi", "greenlet", "prometheus_client", "python_multipart", "uvicorn")
_TOKEN, _MOST_TOKEN = "S2P_SERVE_TOKEN", 4096
_TOKEN_TEXT = re.compile(r"[!-~]{16,}")

IpAdaptersOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE",
        help="An IP-Adapter that requests may name, image_encoder beside it, for an engine exported with "
        "--image-tokens; repeatable.",
    ),
]
ControlNetsOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FOLDER", help="A ControlNet that requests may name, for an engine exported for it; repeatable."
    ),
]
LorasOption = Annotated[
    list[str] | None,
    typer.Option(
        metavar="NAME=FILE", help="A LoRA that requests may name, for an engine with low-rank branches; repeatable."
    ),
]
LoraMemoryOption = Annotated[
    int, typer.Option(min=1, metavar="MIB", help="Memory that all LoRAs may take, those of --lora among them.")
]
AgainstOption = Annotated[
    Path | None, typer.Option(metavar="FP_ENGINE", help="A second engine, which the page draws beside the first.")
]
SizesOption = Annotated[
    list[str] | None,
    typer.Option(metavar="WIDTHxHEIGHT", help="A size besides the model's own that may be asked for; repeatable."),
]
TokenOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="Ask every client for the token in this file (or in S2P_SERVE_TOKEN)."),
]
RayOption = Annotated[bool, typer.Option("--ray", help="Draw in replicas on Ray, one per device.")]
ReplicasOption = Annotated[int, typer.Option(min=1, help="With --ray: how many.")]
RayAddressOption = Annotated[
    str | None,
    typer.Option(metavar="HOST:PORT", help="With --ray: a cluster that runs already; one is started otherwise."),
]
ActiveOption = Annotated[
    int | None, typer.Option(min=1, help="Requests drawn at once; as many as fill a batch where left out.")
]


def serve(  # noqa: PLR0913 - its options
    engine: EngineArgument,
    *,
    against: AgainstOption = None,
    name: Annotated[
        str | None, typer.Option(help="The model's name for clients; ENGINE's folder where left out.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen; the default can be reached from this machine only.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes any that is free, and says which.")] = 8000,
    batching: Annotated[
        Literal["step", "request", "one"],
        typer.Option(help="Form a batch anew at every step, of requests on the same schedule, or of one request."),
    ] = "step",
    max_queue: Annotated[int, typer.Option(min=0, help="Requests that may wait; more get 429.")] = 64,
    max_active: ActiveOption = None,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds that a request may take.")] = 120.0,
    max_steps: Annotated[int, typer.Option(min=1, help="Steps that a request may ask for.")] = 100,
    size: SizesOption = None,
    schedule: SchedulesOption = None,
    components: ComponentsOption = None,
    controlnet: ControlNetsOption = None,
    ip_adapter: IpAdaptersOption = None,
    lora: LorasOption = None,
    lora_memory: LoraMemoryOption = 1024,
    device: DeviceOption = "auto",
    threads: ThreadsOption = None,
    token_file: TokenOption = None,
    ray: RayOption = False,
    replicas: ReplicasOption = 1,
    ray_address: RayAddressOption = None,
    drain_seconds: Annotated[float, typer.Option(min=0, help="What running requests have after SIGTERM.")] = 30.0,
    model: ModelOption = None,
    public_key: PublicKeyOption = None,
    as_json: JsonOption = False,
) -> int:
    """Serve an engine over HTTP: OpenAI's images API, health, metrics, a page.

    Runs until SIGTERM (exit 0) or SIGINT (exit 130). Prints its address once the port is taken, and a second line once
    the engine is ready. Needs the extra serve.
    """
    check_installed("serve", _PACKAGES)
    from s2p_deploy.serve.http.images import HttpLimits
    from s2p_deploy.serve.http.metrics import Metrics
    from s2p_deploy.serve.http.models import ServedModels
    from s2p_deploy.serve.http.server import allowed_hosts, listen, log_to_stderr, run_server
    from s2p_deploy.signing import open_engine

    if ray:
        from s2p_deploy.serve.ray import RaySettings, ReplicaSpec, check_ray, serve_replicas

        check_ray(ray_address)
        cluster = RaySettings(replicas, ray_address, drain_seconds=drain_seconds)
        if against is not None:
            raise InputError("--against cannot be used with --ray: serve the other engine by a command of its own")
    lora_bytes = lora_memory * 2**20
    pictures = bool(controlnet or ip_adapter)
    limits = HttpLimits(seconds=timeout, steps=max_steps, sizes=_sizes(size), adapter_pictures=pictures)
    limits = replace(limits, lora_bytes=min(limits.lora_bytes, lora_bytes))
    token = _token(token_file)
    second = None if against is None else open_engine(against, public_key)
    engines = _named(open_engine(engine, public_key), second, name)
    first = next(iter(engines))
    networks = None if components is None else as_components(components, public_key)
    adapters = {
        "controlnets": _controlnets(controlnet or []),
        "ip_adapters": _ip_adapters(ip_adapter or []),
        "loras": _loras(lora or []),
        "lora_bytes": lora_bytes,
    }
    settings = partial(_settings, batching, max_queue, max_active, schedule, networks, **adapters)
    base = cache(partial(base_of, engines[first].manifest, model))
    context = Context(device=device, threads=threads)
    if device != "auto":
        _ = context.torch_device  # a wrong name is refused before anything is read
    listening = listen(host, port)
    on_ready = partial(_report_ready, tuple(engines), listening.url, as_json=as_json)
    if not as_json:
        _print(f"serving {first} on {listening.url}")
    if ray:
        log_to_stderr()
        hosts, (address, port, *_) = allowed_hosts(listening, token), listening.socket.getsockname()
        listening.socket.close()  # Ray's proxy, another process, binds the port
        spec = ReplicaSpec.of(
            engines[first], base(), first, settings(), limits, hosts=hosts, token=token, context=context
        )
        with _stopped_by_ctrl_c():
            serve_replicas(spec, cluster, address, port, on_ready)
        return 0
    metrics = Metrics()
    openings = {one: partial(_open, opened, base, one, settings, metrics, context) for one, opened in engines.items()}
    models = ServedModels(openings, on_ready)
    with _stopped_by_ctrl_c():
        run_server(models, limits, metrics, listening, token=token, drain_seconds=drain_seconds)
    return 0


@contextmanager
def _stopped_by_ctrl_c() -> Iterator[None]:
    """Raises ServerStoppedError where Ctrl-C ends what runs inside: other commands go on when they are repeated."""
    try:
        yield
    except KeyboardInterrupt as error:
        raise ServerStoppedError("stopped") from error


def check_installed(command: str, packages: tuple[str, ...]) -> None:
    """Raises MissingEnvironmentError where a package of the extra ``serve`` is missing."""
    for package in packages:
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise MissingEnvironmentError(f"{command} needs {package}: pip install 's2p-deploy[serve]'") from error


def _settings(
    batching: Batching,
    max_waiting: int,
    max_active: int | None,
    schedules: list[str] | None,
    component_engines: ComponentEngines | None,
    **adapters: Any,  # noqa: ANN401 - fields of the settings
) -> ServiceSettings:
    from s2p_deploy.serve.service import ServiceSettings

    bound = tuple(schedule_from_option(text) for text in schedules or ())
    return ServiceSettings(
        batching, max_waiting, max_active, schedules=bound, component_engines=component_engines, **adapters
    )


def _controlnets(texts: list[str]) -> tuple[tuple[str, Path], ...]:
    """Parses names and folders of ControlNets."""
    folders = _named_paths("--controlnet", "NAME=FOLDER", texts)
    for name, folder in folders:
        if not any((folder / file).is_file() for file in ("config.json", "manifest.json")):
            what = "no ControlNet in diffusers format, and no engine of one"
            raise InputError(f"--controlnet {name}={folder}: it is {what}")
    return folders


def _ip_adapters(texts: list[str]) -> tuple[tuple[str, Path], ...]:
    """Parses names and files of IP-Adapters."""
    files = _named_paths("--ip-adapter", "NAME=FILE", texts)
    for name, file in files:
        if not file.is_file():
            raise InputError(f"--ip-adapter {name}={file}: there is no such file")
    return files


def _loras(texts: list[str]) -> tuple[tuple[str, Path], ...]:
    """Parses names and files of LoRAs."""
    files = _named_paths("--lora", "NAME=FILE", texts)
    for name, file in files:
        if not file.is_file():
            raise InputError(f"--lora {name}={file}: {file} does not exist: give a .safetensors file")
    return files


def _named_paths(option: str, form: str, texts: list[str]) -> tuple[tuple[str, Path], ...]:
    paths: dict[str, Path] = {}
    for text in texts:
        name, equals, path = text.partition("=")
        if not equals or not _NAME.fullmatch(name) or name in paths:
            raise InputError(f"{option} {text!r} must be {form}, each name once, of letters, digits and ._-")
        paths[name] = Path(path).resolve()
    return tuple(paths.items())


def _open(
    engine: Engine,
    base: Callable[[], BasePipeline],
    name: str,
    settings: Callable[[], ServiceSettings],
    metrics: Metrics,
    context: Context,
) -> ImageService:
    """Opens a service of an engine. Slow; called beside the server, which answers already."""
    gc.disable()  # while a million objects come that stay: their collection is a sixth of the imports' time
    from s2p_deploy.serve.service import open_service

    gc.freeze()
    gc.enable()
    service = open_service(engine, base(), settings(), metrics.observer(name), name, context)
    metrics.watch(name, service)
    return service


def _named(engine: Engine, against: Engine | None, name: str | None) -> dict[str, Engine]:
    """Names the engines for clients, the first one first."""
    first = engine.folder.resolve().name if name is None else name
    if not _NAME.fullmatch(first):
        raise InputError(f"{first!r} is no name for a model: pass --name with letters, digits and ._-")
    if against is None:
        return {first: engine}
    if against.manifest.base.digest != engine.manifest.base.digest:
        raise InputError(f"{against.folder} is not of the same pipeline as {engine.folder}: nothing to compare")
    second = against.folder.resolve().name
    return {first: engine, second if second != first and _NAME.fullmatch(second) else f"{first}.fp": against}


def _sizes(texts: list[str] | None) -> frozenset[tuple[int, int]]:
    """Parses sizes to heights and widths in pixels."""
    parsed = [(text, _SIZE.fullmatch(text)) for text in texts or ()]
    for text, match in parsed:
        if match is None:
            raise InputError(f"--size {text!r} must be WIDTHxHEIGHT in pixels, e.g. 768x512")
    return frozenset((int(match[2]), int(match[1])) for _, match in parsed if match)


def _token(file: Path | None) -> str | None:
    """Reads the token that clients must bring, from the file or the environment."""
    if file is None:
        token = os.environ.get(_TOKEN)
        where = _TOKEN
    else:
        where = str(file)
        try:
            with file.open(encoding="ascii") as opened:
                token = opened.read(_MOST_TOKEN)
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"--token-file {file} cannot be read as a token") from error
    if token is None:
        return None
    if not _TOKEN_TEXT.fullmatch(token.strip()):
        raise InputError(f"{where} must hold a token: at least 16 visible ASCII characters, without spaces")
    return token.strip()


def _report_ready(names: tuple[str, ...], url: str, seconds: float, *, as_json: bool) -> None:
    if as_json:
        show(Outcome({"models": list(names), "url": url, "ready_seconds": seconds}, ()), as_json=True)
        sys.stdout.flush()
    else:
        _print(f"ready after {seconds:.1f} s")


def _print(line: str) -> None:
    """Prints a line at once: whoever started the server waits for it."""
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()
