"""The same training step in PyTorch, for `throughput`: U-Net, loss, clipping, Adam, average.

Nothing imports PyTorch before it is asked for: it is in the extra [parity].
"""

import contextlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from adaptive_ts.diffusion.corruption import corrupt, prediction_target
from adaptive_ts.experiment.config.groups import Config
from adaptive_ts.experiment.config.methods import make_schedule
from adaptive_ts.experiment.costs.race import CannotRunError
from adaptive_ts.experiment.errors import UserError, one_line

FLAVOURS = ("eager", "compiled")
INSTALL = "python -m pip install -e '.[train,parity]'"


def check_torch(config: Config, mesh: Mesh) -> None:
    """Raises UserError where PyTorch cannot do the same as JAX here, or is not installed."""
    if importlib.util.find_spec("torch") is None:
        raise UserError(f"--torch: PyTorch is not installed: {INSTALL}")
    if config.model.name != "unet":
        raise UserError(f"--torch: only the U-Net is there in PyTorch, got {config.model.name!r}")
    if config.model.remat:
        raise UserError("--torch: --model.remat True is not there in PyTorch: leave it out")
    if config.weighting.name != "none":
        raise UserError(
            f"--torch: the loss weighting {config.weighting.name!r} is not there in PyTorch: add "
            "--weighting.name none"
        )
    if mesh.size > 1:
        raise UserError(
            f"--torch: runs on one device, JAX has {mesh.size}: hide the others, as "
            "CUDA_VISIBLE_DEVICES=0 does"
        )
    _device(mesh)


def versions() -> dict[str, str]:
    """Of PyTorch, for the report."""
    import torch

    return {"torch": torch.__version__, "torch_threads": str(torch.get_num_threads())}


def settle(mesh: Mesh, computed_in: str) -> str:
    """PyTorch's settings for the whole process, and a line that says them.

    Args:
      mesh: of JAX.
      computed_in: what JAX computes float32's products in: "tf32" or "float32".
    """
    import torch

    device = _device(mesh)
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    torch.set_num_threads(threads)
    # Each entry compiles its own functions; past the limit PyTorch would go on without compiling.
    torch._dynamo.config.recompile_limit = 1000
    told = f"PyTorch {torch.__version__}: channels_last, fused Adam, one graph by torch.compile"
    if device == "cpu":
        return f"{told}; {threads} threads"
    tf32 = computed_in == "tf32"
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    torch.backends.cudnn.allow_tf32 = tf32
    torch.backends.cudnn.benchmark = True
    return f"{told}; TF32 {'on' if tf32 else 'off'}, cudnn.benchmark on"


class TorchTrainer:
    """Trains the U-Net on one batch that lies on the device: a call is a cycle of f_S steps.

    Calling it raises `CannotRunError` where memory is short, or ``torch.compile`` does not work.

    Args:
      config: of the run; its optimizer, schedule, prediction and dropout are the ones used.
      images: (b, H, W, C), uint8 or float.
      dtype: "float32", or "bfloat16" by autocast: parameters stay float32, as in JAX.
      compiled: whether forward and backward go through ``torch.compile``.
      mesh: of JAX, whose device is PyTorch's too.
    """

    def __init__(
        self, config: Config, images: np.ndarray, dtype: str, *, compiled: bool, mesh: Mesh
    ):
        import torch

        from adaptive_ts.experiment.costs.torch_unet import UNet

        c, self.device = config.optimizer, _device(mesh)
        torch.manual_seed(config.seed)
        model = UNet(config.model, images.shape[-1]).to(self.device).train()
        self.model = model.to(memory_format=torch.channels_last)
        self.parameters = list(model.parameters())
        self.average = [p.detach().clone() for p in self.parameters]
        self._images = torch.from_numpy(images).to(self.device)
        self._adam = torch.optim.Adam(self.parameters, 0.0, (c.b1, c.b2), fused=True)
        loss = _loss_function(config, model, self.device, dtype)
        self.loss = torch.compile(loss, fullgraph=True, dynamic=False) if compiled else loss
        self._config, self._compiled, self._done = config, compiled, 0

    def variants(self) -> dict[str, Callable[[], Any]]:
        """Name of a step -> one such step, to its end."""
        return {"plain": lambda: (self._step(), self._wait())}

    def __call__(self) -> None:
        import torch

        first = self._done == 0
        try:
            for _ in range(self._config.sampler.every):
                self._step()
            self._wait()
        except torch.OutOfMemoryError as error:
            raise CannotRunError(f"out of memory ({one_line(error)})") from None
        except Exception as error:
            if not (self._compiled and first):
                raise
            raise CannotRunError(f"torch.compile does not work here ({one_line(error)})") from None

    def _step(self) -> Any:
        import torch

        c = self._config.optimizer
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the compiler's advice, and its own deprecations
            loss = self.loss(self._images)
            loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, c.clip_norm)
        warm = min(1.0, self._done / c.warmup_steps) if c.warmup_steps else 1.0
        for group in self._adam.param_groups:
            group["lr"] = c.learning_rate * warm
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        decay = min(c.ema_decay, (1 + self._done) / (10 + self._done))
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.parameters, 1 - decay)
        self._done += 1
        return loss.detach(), norm

    def _wait(self) -> None:
        import torch

        if self.device == "cuda":
            torch.cuda.synchronize()


@contextlib.contextmanager
def profile(folder: Path) -> Iterator[None]:
    """Writes PyTorch's own profile of what happens meanwhile: ``folder/trace.json``."""
    import torch

    folder.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as profiler:
        yield
    profiler.export_chrome_trace(str(folder / "trace.json"))


def _device(mesh: Mesh) -> str:
    """ "cpu" or "cuda", as JAX has it.

    Raises:
      UserError: JAX's device is none that PyTorch has here.
    """
    import torch

    platform = mesh.devices.flat[0].platform
    if platform == "cpu":
        return "cpu"
    if platform == "gpu" and torch.cuda.is_available():
        return "cuda"
    raise UserError(
        f"--torch: JAX runs on a {platform}, PyTorch {torch.__version__} has none: install a "
        "PyTorch for it, or leave out --torch"
    )


def coefficients(config: Config) -> tuple[np.ndarray, ...]:
    """(T,) each: x_t = a x_0 + b eps, and the target c x_0 + d eps, by timestep."""
    c = config.schedule
    schedule, t = make_schedule(config), jnp.arange(c.num_timesteps)
    one, none = jnp.ones((c.num_timesteps, 1)), jnp.zeros((c.num_timesteps, 1))
    found = []
    for x0, noise in ((one, none), (none, one)):
        target = prediction_target(schedule, config.model.prediction, x0, noise, t)
        found.append((corrupt(schedule, x0, noise, t), target))
    (a, c_), (b, d) = found
    return tuple(np.array(jax.device_get(x), np.float32)[:, 0] for x in (a, b, c_, d))


def _loss_function(config: Config, model: Any, device: str, dtype: str) -> Any:
    """(b, H, W, C) images -> the mean loss at uniform timesteps, as the step of `step` has it."""
    import torch

    tables = [torch.from_numpy(x).to(device)[:, None, None, None] for x in coefficients(config)]
    mixed, flip = dtype == "bfloat16", config.data.flip

    def loss(images: torch.Tensor) -> torch.Tensor:
        b = images.shape[0]
        x0 = images.permute(0, 3, 1, 2).float()  # NHWC in memory: channels_last
        if not images.is_floating_point():
            x0 = x0 / 127.5 - 1
        if flip:
            mirror = torch.rand((b, 1, 1, 1), device=device) < 0.5
            x0 = torch.where(mirror, x0.flip(3), x0)
        t = torch.randint(config.schedule.num_timesteps, (b,), device=device)
        noise = torch.randn_like(x0)
        to_x, to_noise, target_x, target_noise = (table[t] for table in tables)
        with torch.autocast(device, dtype=torch.bfloat16, enabled=mixed):
            output = model(to_x * x0 + to_noise * noise, t)
        return torch.mean((output - (target_x * x0 + target_noise * noise)) ** 2)

    return loss
