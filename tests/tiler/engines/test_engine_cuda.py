"""The batch engine: on the CPU against the module, with copies that take their time; on CUDA where there is one."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from outsize.models.segmentation.networks.unet import UNet
from outsize.tiler.analysis.agreement import takes_batches
from outsize.tiler.analysis.network import Network, analyze_network
from outsize.tiler.base.errors import EngineError
from outsize.tiler.base.geometry import Window
from outsize.tiler.base.tile import Tile
from outsize.tiler.engines.cuda import BatchTiles, pick_device
from outsize.tiler.engines.engine import EngineProgram
from outsize.tiler.engines.loading import compile_program, load_tiles, load_windows
from outsize.tiler.engines.programs import TorchPrograms, open_programs
from outsize.tiler.engines.torch import Forward, TorchEngine, takes_channels_last
from outsize.tiler.planning.planner import plan_tiles
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ...support.architectures import ARCHITECTURES
from ...support.zoo import ZOO, Finished, alive

pytestmark = pytest.mark.system

needs_cuda = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="torch sees no CUDA device (OUTSIZE_TEST_CUDA=1 shows it)"
)


def tile_of(image: np.ndarray, crop: tuple[int, int, int, int] | None = None) -> Tile:
    """A tile whose window is the image, and whose core is a part of its result."""
    whole = Window(y=0, x=0, height=image.shape[-2], width=image.shape[-1])
    y, x, height, width = crop or (0, 0, *whole.shape)
    cut = Window(y=y, x=x, height=height, width=width)
    return Tile(row=0, column=0, core=cut, target=cut, window=whole, crop=cut)


def images_of(count: int, shapes: tuple[tuple[int, int], ...], dtype: str) -> list[np.ndarray]:
    numbers = np.random.default_rng(0)
    return [(numbers.random((3, *shapes[i % len(shapes)])) * 200).astype(dtype) for i in range(count)]


class SlowStreams:
    """Streams as CUDA has them, of threads: what is queued happens later, each kind in its own order, with separate
    memory on both sides that holds rubbish until something is copied there."""

    def __init__(self) -> None:
        self._pools = [ThreadPoolExecutor(1) for _ in range(3)]
        self._numbers = np.random.default_rng(0)
        self.overlapped = 0
        self._busy = [False, False, False]

    def allocate(self, size: int) -> tuple[Tensor, Tensor]:
        return torch.full((size,), 77, dtype=torch.uint8), torch.full((size,), 33, dtype=torch.uint8)

    def allocate_host(self, size: int) -> Tensor:
        return torch.full((size,), 55, dtype=torch.uint8)

    def peak_bytes(self) -> int:
        return 0

    def _queue(self, kind: int, work: Callable[[], Any], after: Future[Any] | None) -> Future[Any]:
        pause = float(self._numbers.uniform(0, 0.003))

        def later() -> Any:
            if after is not None:
                after.result()
            self._busy[kind] = True
            self.overlapped += sum(self._busy) > 1
            time.sleep(pause)
            with torch.inference_mode():
                result = work()
            self._busy[kind] = False
            return result

        return self._pools[kind].submit(later)

    def begin(
        self,
        upload: Callable[[], None],
        compute: Callable[[], list[Tensor]],
        download: Callable[[list[Tensor]], None],
    ) -> Callable[[], None]:
        uploaded = self._queue(0, upload, None)
        computed = self._queue(1, compute, uploaded)
        downloaded = self._queue(2, lambda: download(computed.result()), computed)
        return lambda: downloaded.result()


class Slow(nn.Module):
    """A network that does nothing much, and reads its input late."""

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(0.001)
        return x.flip(1) * 3 + 1


@pytest.mark.parametrize("batch", [1, 3])
def test_copies_beside_computation_mix_nothing_up(batch: int) -> None:
    streams = SlowStreams()
    tiles = BatchTiles(Forward(Slow(), has_logits=False), streams, batch)
    images = images_of(60, ((7, 11), (13, 5)), "float32")
    crops = [(i % 3, i % 2, 4, 3) for i in range(len(images))]

    def one(index: int) -> np.ndarray:
        return tiles.run_tile(images[index], tile_of(images[index], crops[index]))

    with ThreadPoolExecutor(4 * batch) as pool:
        results = list(pool.map(one, range(len(images))))
    for image, (y, x, height, width), result in zip(images, crops, results, strict=True):
        assert np.array_equal(result, (image[::-1] * 3 + 1)[:, y : y + height, x : x + width])
    assert streams.overlapped > 10


class Early(SlowStreams):
    """Streams that do not say when they are done: what reads results before that gets rubbish."""

    def begin(self, *work: Any) -> Callable[[], None]:
        super().begin(*work)
        return lambda: None


def test_the_slow_streams_would_notice_a_result_read_too_early() -> None:
    tiles = BatchTiles(Forward(Slow(), has_logits=False), Early(), 1)
    image = images_of(1, ((7, 11),), "float32")[0]
    with pytest.raises((IndexError, AssertionError)):
        assert np.array_equal(tiles.run_tile(image, tile_of(image)), image[::-1] * 3 + 1)


@pytest.mark.parametrize("name", ZOO)
def test_a_batch_of_windows_is_each_of_them_alone_in_float64(name: str) -> None:
    network = analyze_network(alive(ZOO[name]()), bands=3)
    packed = replace(compile_program(network, "torch", threads=1), batch=2)
    assert packed.is_shared
    assert packed.channels_last
    tiles = load_tiles(packed)
    images = [image / 100 for image in images_of(5, ((36, 48), (24, 60)), "float64")]
    with ThreadPoolExecutor(5) as pool:
        results = list(pool.map(lambda image: tiles.run_tile(image, _cut(network, image)), images))
    for image, result in zip(images, results, strict=True):
        with torch.no_grad():
            expected = network.module(torch.from_numpy(image)[None])[0].numpy()
        expected = expected[:, 1:-1, 2:]
        assert result.shape == expected.shape
        assert np.abs(result - expected).max() < 1e-12 * max(1, np.abs(expected).max())


def _cut(network: Network, image: np.ndarray) -> Tile:
    height, width = network.output_shape((image.shape[1], image.shape[2]))
    return tile_of(image, (1, 2, height - 2, width - 2))


@pytest.mark.parametrize("dtype", ["uint8", "int16", "uint16", "float32"])
def test_raw_pixels_of_any_type_come_out_as_the_plain_engine_has_them(dtype: str) -> None:
    network = analyze_network(Finished().eval(), bands=3, dtype=dtype)
    packed = compile_program(network, "torch", threads=1)
    plain = TorchEngine(copy.deepcopy(network.module), has_logits=True)
    tiles = load_tiles(replace(packed, batch=3))
    for image in images_of(3, ((33, 47), (47, 33)), dtype):
        expected, logits = plain.run_with_logits(image)
        result, shown = tiles.run_tile_with_logits(image, tile_of(image))
        assert np.abs(shown - logits).max() < 1e-5 * np.abs(logits).max()
        assert result.dtype == np.uint8
        assert np.abs(result.astype(int) - expected.astype(int)).max() <= 1
        assert np.array_equal(tiles.run_tile(image, tile_of(image)), result)


class Reshaped(nn.Module):
    """Without reshape: a view of what a convolution gives."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return y.view(y.shape[0], 2, 2, y.shape[2], y.shape[3]).sum(2)


def test_a_module_that_views_its_tensors_keeps_their_order() -> None:
    network = analyze_network(alive(Reshaped()), bands=3)
    assert not takes_channels_last(network)
    image = images_of(1, ((19, 23),), "float64")[0]
    packed = compile_program(network, "torch", threads=1)
    with torch.no_grad():
        expected = network.module(torch.from_numpy(image)[None])[0].numpy()
    assert np.allclose(load_windows(packed).run(image), expected, rtol=1e-12, atol=0)
    kernel = load_windows(packed)._forward._module.convolution.weight  # pyright: ignore[reportAttributeAccessIssue]
    assert kernel.is_contiguous()


def test_workers_hold_weights_with_channels_last_and_the_callers_module_stays_as_it_is() -> None:
    network = analyze_network(UNet(3, 2, (4, 6)).eval(), bands=3)
    seen: list[bool] = []
    loaded = load_windows(compile_program(network, "torch", threads=1))
    assert isinstance(loaded, TorchEngine)
    inner = loaded._forward._module
    assert isinstance(inner, nn.Module)
    for module in (inner, network.module):
        kernels = [p for p in module.parameters() if p.ndim == 4 and min(p.shape[1:]) > 1]
        seen.append(all(kernel.is_contiguous(memory_format=torch.channels_last) for kernel in kernels))
    assert seen == [True, False]


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_autocast_gives_floats_near_those_of_float32(precision: Any) -> None:
    network = analyze_network(Finished().eval(), bands=3, dtype="uint8")
    packed = compile_program(network, "torch", 1, precision)
    image = images_of(1, ((33, 47),), "uint8")[0]
    exact = load_windows(replace(packed, precision="float32")).run_with_logits(image)[1]
    for program in (packed, replace(packed, batch=2)):
        result, logits = load_tiles(program).run_tile_with_logits(image, tile_of(image))
        assert (result.dtype, logits.dtype) == (np.uint8, np.float32)
        loss = np.abs(logits - exact).max() / np.abs(exact).max()
        assert 1e-5 < loss < 0.05


class Joins(nn.Module):
    """Takes the mean of all images that come together."""

    def forward(self, x: Tensor) -> Tensor:
        return x - x.mean(0, keepdim=True) + 1


class Fixed(nn.Module):
    """Knows one image only."""

    def forward(self, x: Tensor) -> Tensor:
        return x.reshape(1, 3, x.shape[2], x.shape[3]) * 2


def test_networks_that_join_images_or_fix_their_number_get_one_at_a_time() -> None:
    size, dtype = (17, 19), torch.float64
    assert takes_batches(alive(ZOO["unet depth 1"]()), 3, size, dtype)
    assert not takes_batches(Joins(), 3, size, dtype)
    assert not takes_batches(Fixed(), 3, size, dtype)


def test_a_worker_takes_the_device_it_is_shown() -> None:
    assert [pick_device(name, 4) for name in ("cuda", "cuda:0", "cuda:3")] == [0, 0, 3]
    assert [pick_device(name, 1) for name in ("cuda", "cuda:0", "cuda:3")] == [0, 0, 0]
    for visible in (0, 2):
        with pytest.raises(EngineError, match=f"needs cuda:3, and sees {visible} CUDA devices"):
            pick_device("cuda:3", visible)


@pytest.mark.skipif(torch.cuda.is_available(), reason="torch sees a CUDA device here")
def test_a_worker_without_the_plans_device_says_so() -> None:
    network = analyze_network(alive(ZOO["convolution"]()), bands=3)
    packed = replace(compile_program(network, "torch", 1), device="cuda")
    with pytest.raises(EngineError, match="needs cuda, and sees 0 CUDA devices"):
        load_tiles(packed)


MAKERS = ("unet bilinear corners", "unet bicubic", "unet average pooled uncounted", "unet transposed output padding")
MAKERS += ("fcn8", "reflect padded", "partial convolution", "broadcast", "depth to space", "gapped")
"""Networks whose programs make tensors of their own."""


class OneDevice(TorchDispatchMode):
    """Refuses operations on tensors of two devices, as CUDA does; numbers alone may be anywhere."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor) and value.ndim]
        assert len({tensor.device.type for tensor in tensors}) < 2, f"{func} on two devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*ZOO, *MAKERS])
def test_programs_make_all_their_tensors_on_the_images_device(name: str) -> None:
    """torch's meta device, which has shapes only, stands in for one that is not there."""
    network = analyze_network(alive((ZOO.get(name) or ARCHITECTURES[name])()), bands=3)
    shape = (101, 97)
    plan = plan_tiles((3, *shape), network, core=64, method="program", engine="torch", memory="8GB", device="cpu")
    tiles = TorchPrograms(network, shape, torch.device("meta"))
    with torch.inference_mode(), OneDevice():
        for at in plan.grid:
            tile = plan.tile(*at)
            image = torch.zeros((1, 3, *tile.window.shape), dtype=torch.float64, device="meta")
            (output,) = tiles.program(tile)(image)
            assert output.device.type == "meta"
            assert tuple(output.shape[2:]) == tile.core.shape


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")  # inductor's own
@pytest.mark.long
def test_a_compiled_module_gives_the_same() -> None:
    network = analyze_network(Finished().eval(), bands=3, dtype="uint8")
    packed = compile_program(network, "torch", 1)
    image = images_of(1, ((33, 47),), "uint8")[0]
    _, expected = load_windows(packed).run_with_logits(image)
    _, logits = load_windows(replace(packed, compiles=True)).run_with_logits(image)
    assert np.abs(logits - expected).max() < 1e-5 * np.abs(expected).max()


# What follows runs on machines with a CUDA device only; docs/reference/engines.md has what to expect.


def _on_cuda(network: Network, **settings: Any) -> EngineProgram:
    return replace(compile_program(network, "torch", 1), device="cuda", **settings)


@needs_cuda
@pytest.mark.parametrize("name", ZOO)
def test_cuda_equals_the_module_on_the_cpu(name: str) -> None:
    for dtype, tolerance in ((torch.float64, 1e-10), (torch.float32, 1e-5)):
        network = analyze_network(alive(ZOO[name]()).to(dtype), bands=3)
        tiles = load_tiles(_on_cuda(network, batch=2))
        for image in images_of(4, ((36, 48), (24, 60)), str(dtype).removeprefix("torch.")):
            image /= 100
            with torch.no_grad():
                expected = network.module(torch.from_numpy(image)[None])[0].numpy()
            height, width = expected.shape[1:]
            result = tiles.run_tile(image, tile_of(image, (0, 0, height, width)))
            assert np.abs(result - expected).max() < tolerance * max(1, np.abs(expected).max())


@needs_cuda
def test_cuda_gives_a_window_the_same_alone_and_in_company() -> None:
    network = analyze_network(UNet(3, 4, (16, 32)).eval(), bands=3)
    images = images_of(40, ((128, 96), (96, 128)), "float32")
    alone, together = (load_tiles(_on_cuda(network, batch=batch)) for batch in (1, 4))
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda image: together.run_tile(image, tile_of(image)), images))
    for image, result in zip(images, found, strict=True):
        expected = alone.run_tile(image, tile_of(image))
        assert np.abs(result - expected).max() < 1e-5 * np.abs(expected).max()


@needs_cuda
def test_cuda_rounds_no_inputs_to_tf32_unless_it_is_asked() -> None:
    network = analyze_network(UNet(3, 4, (16, 32)).eval(), bands=3)
    image = images_of(1, ((128, 96),), "float32")[0]
    exact = TorchEngine(copy.deepcopy(network.module)).run(image)
    errors: dict[str, float] = {}
    for precision in ("float32", "tf32", "bfloat16"):
        result = load_tiles(_on_cuda(network, precision=precision)).run_tile(image, tile_of(image))
        errors[precision] = float(np.abs(result - exact).max() / np.abs(exact).max())
        assert torch.backends.cudnn.allow_tf32 == torch.backends.cuda.matmul.allow_tf32 == (precision == "tf32")
    assert errors["float32"] < 1e-5 < errors["bfloat16"]
    if torch.cuda.get_device_capability() >= (8, 0):
        assert errors["float32"] < errors["tf32"] < 0.05


@needs_cuda
def test_cuda_keeps_its_limit_and_says_what_it_took() -> None:
    network = analyze_network(UNet(3, 4, (16, 32)).eval(), bands=3)
    limit = 300_000_000
    tiles = load_tiles(_on_cuda(network, device_limit_bytes=limit))
    assert isinstance(tiles, BatchTiles)
    image = images_of(1, ((256, 256),), "float32")[0]
    tiles.run_tile(image, tile_of(image))
    assert 0 < tiles.device_peak_bytes() <= limit
    large = images_of(1, ((4096, 4096),), "float32")[0]
    with pytest.raises(EngineError, match="no memory left"):
        tiles.run_tile(large, tile_of(large))
    torch.cuda.set_per_process_memory_fraction(1.0)


@needs_cuda
@pytest.mark.parametrize("name", ZOO)
def test_cuda_programs_equal_those_of_the_cpu(name: str) -> None:
    network = analyze_network(alive(ZOO[name]()), bands=3)
    shape = (101, 97)
    plan = plan_tiles((3, *shape), network, core=64, method="program", engine="torch", memory="8GB", device="cpu")
    here, there = (open_programs(network, "torch", 1, shape, device) for device in ("cpu", "cuda"))
    image = images_of(1, (shape,), "float64")[0] / 100
    for at in plan.grid:
        tile = plan.tile(*at)
        part = np.ascontiguousarray(image[(slice(None), *tile.window.slices())])
        expected = here.run_tile(part, tile)
        assert np.abs(there.run_tile(part, tile) - expected).max() < 1e-10 * max(1, np.abs(expected).max())
