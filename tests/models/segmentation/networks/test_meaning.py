"""What a network's values mean: told by how it ends, said by its user, and turned into classes and probabilities."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from outsize.models import SegmentationClass, SegmentationModel, as_tile_network, describe_output
from outsize.models.segmentation.files.sources import name_classes
from outsize.models.segmentation.networks.ending import watch
from outsize.models.segmentation.networks.meaning import Statement
from outsize.models.segmentation.networks.model import default_output, fit_classes, meaning_of
from outsize.models.segmentation.networks.probe import find_meaning
from outsize.models.segmentation.networks.scaling import Scaling
from outsize.tiler.base.dtypes import output_nodata, stored_dtype
from outsize.tiler.base.errors import OutputError, UsageError
from outsize.tiler.output.values import as_stored
from torch import Tensor, nn
from torch.nn import functional as F

Finish = Callable[[Tensor], Tensor]


class Ended(nn.Module):
    """A small network whose logits go through `finish`."""

    def __init__(self, channels: int = 2, finish: Finish = lambda z: z) -> None:
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(channels)
            self.body = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, channels, 1))
        with torch.no_grad():
            # So that the logits are far apart.
            self.body[2].weight *= 30
        self.finish = finish

    def forward(self, x: Tensor) -> Tensor:
        return self.finish(self.body(x))


def first_squashed_in_place(z: Tensor) -> Tensor:
    z[:, :1].sigmoid_()
    return z


ENDINGS: list[tuple[str, Finish, str, int | None]] = [
    ("nothing", lambda z: z, "affine", None),
    ("a crop", lambda z: z[..., 1:-1, 1:-1], "affine", None),
    ("softmax", lambda z: z.softmax(1), "softmax", 2),
    ("Softmax2d and nearest", lambda z: F.interpolate(nn.Softmax2d()(z), scale_factor=2), "softmax", 2),
    ("softmax of permuted channels", lambda z: z.permute(0, 2, 3, 1).softmax(-1).permute(0, 3, 1, 2), "softmax", 2),
    ("one of a softmax", lambda z: z.softmax(1)[:, 1:], "softmax", 2),
    ("softmax over one", lambda z: z[:, :1].softmax(1), "softmax", 1),
    ("log_softmax", lambda z: F.log_softmax(z, 1), "log-softmax", 2),
    ("sigmoid", torch.sigmoid, "sigmoid", None),
    ("sigmoid in place", lambda z: z.sigmoid_(), "sigmoid", None),
    ("sigmoid in place of one channel", first_squashed_in_place, "other", None),
    ("logsigmoid", F.logsigmoid, "log-sigmoid", None),
    ("argmax", lambda z: z.argmax(1), "classes", 2),
    ("argmax as floats", lambda z: z.argmax(1, keepdim=True).float(), "classes", 2),
    ("argmax as bytes", lambda z: z.argmax(1)[:, None].to(torch.uint8), "classes", 2),
    ("max's indices", lambda z: z.max(1).indices, "classes", 2),
    ("a comparison", lambda z: z[:, 1:] > 0, "classes", 2),
    ("a comparison as floats", lambda z: (z[:, 1:] > 0).float(), "classes", 2),
    ("whole numbers", lambda z: (100 * z[:, :1]).long(), "classes", None),
    ("relu", torch.relu, "other", None),
    ("the mean of softmaxes", lambda z: (z.softmax(1) + z.flip(1).softmax(1)) / 2, "other", None),
    ("softmax and bicubic", lambda z: F.interpolate(z.softmax(1), scale_factor=2, mode="bicubic"), "other", None),
]


@pytest.mark.parametrize(("finish", "kind", "count"), [e[1:] for e in ENDINGS], ids=[e[0] for e in ENDINGS])
def test_the_last_operation_is_seen_whatever_moves_its_values(finish: Finish, kind: str, count: int | None) -> None:
    _, ending = watch(Ended(2, finish).eval(), torch.rand(1, 1, 16, 16))
    assert ending.kind == kind
    if kind in ("classes", "softmax", "log-softmax"):
        assert ending.count == count


def test_traced_scripts_and_exported_programs_end_as_their_module_does() -> None:
    module, image = Ended(3, lambda z: z.softmax(1)).eval(), torch.rand(1, 1, 16, 16)
    with warnings.catch_warnings(action="ignore"):
        script = torch.jit.trace(module, image)
        forms = (script, torch.jit.freeze(script), torch.export.export(module, (image,)).module())
    for form in forms:
        assert watch(form, image)[1].kind == "softmax"


def meaning(finish: Finish, channels: int = 2, **said: Any) -> Any:
    return find_meaning(Ended(channels, finish), 1, "net", Statement(**said))


@pytest.mark.parametrize(
    ("channels", "finish", "task", "activation"),
    [
        (1, lambda z: z, "binary", "none"),
        (1, torch.sigmoid, "binary", "sigmoid"),
        (2, lambda z: z.softmax(1)[:, 1:], "binary", "sigmoid"),
        (2, lambda z: z, "multiclass", "none"),
        (3, torch.relu, "multiclass", "none"),
        (3, lambda z: z.softmax(1), "multiclass", "softmax"),
        (3, lambda z: F.log_softmax(z, 1), "multiclass", "none"),
        (3, lambda z: z.argmax(1), "multiclass", "argmax"),
        (1, lambda z: z > 0, "multiclass", "argmax"),
    ],
)
def test_without_a_word_the_ending_and_the_channels_say_what_is_meant(
    channels: int, finish: Finish, task: str, activation: str
) -> None:
    found = meaning(finish, channels)
    assert (found.task, found.activation, found.doubt) == (task, activation, "")
    assert found.assumed
    assert "assumed" in found.sentence()
    said = meaning(finish, channels, task=task, activation=activation)
    assert (said.task, said.activation, said.assumed) == (task, activation, "")


@pytest.mark.parametrize(
    ("channels", "finish", "words"),
    [
        (2, torch.sigmoid, "sigmoid over 2 channels: say --task multiclass .* --task multilabel"),
        (1, lambda z: z.softmax(1), "softmax is over one channel"),
        (1, lambda z: F.log_softmax(z, 1), "softmax is over one channel"),
        (1, F.logsigmoid, "logarithm of a probability"),
        (3, lambda z: z.softmax(1)[:, 1:], "do not sum to 1"),
        (1, lambda z: 0.5 * (1 + torch.tanh(z)), r"lie in 0..1, whatever the image; say --activation"),
        (3, lambda z: (z.softmax(1) + z.flip(1).softmax(1)) / 2, "sum to 1 in every pixel, whatever the image"),
        (3, lambda z: F.interpolate(z.softmax(1), scale_factor=2, mode="bicubic"), "sum to 1 in every pixel"),
        (3, lambda z: z.argmax(1, keepdim=True).float() * 1.5 - z.argmax(1, keepdim=True) / 2, "whole numbers"),
    ],
)
def test_what_nobody_can_know_is_not_guessed(channels: int, finish: Finish, words: str) -> None:
    model = model_of(Ended(channels, finish), max(1, meaning(finish, channels).channels))
    for output in ("class", "probability"):
        if output == "probability" and "sigmoid over" in words:
            continue  # of each channel, either way
        with pytest.raises(UsageError, match=words):
            as_tile_network(model, output)
    as_tile_network(model, "values")


@pytest.mark.parametrize(
    ("channels", "finish", "said", "words"),
    [
        (2, lambda z: z, {"task": "binary"}, "one channel, net gives 2; .* multiclass, .* multilabel"),
        (1, lambda z: z, {"task": "multiclass"}, "needs two channels or more"),
        (2, lambda z: z, {"threshold": 0.3}, "a threshold is for one channel"),
        (2, lambda z: z, {"activation": "softmax"}, "ends in convolution; it has not applied softmax"),
        (2, lambda z: z.softmax(1), {"activation": "argmax"}, "gives no class numbers"),
        (2, lambda z: z.argmax(1), {"activation": "none"}, "whole numbers, which are classes"),
        (2, lambda z: z.argmax(1), {"task": "binary"}, "whose task is multiclass"),
        (2, lambda z: z.argmax(1), {"task": "regression"}, r"end it with .float\(\)"),
        (2, lambda z: z.long(), {}, "whole numbers in 2 channels"),
        (2, lambda z: z, {"task": "regression", "threshold": 0.5}, "leave activation and threshold out"),
        (1, lambda z: torch.relu(z), {"task": "binary", "activation": "softmax"}, "exclude each other"),
        (2, lambda z: z[:, None], {}, r"a tensor of \(1, 1, 2, 64, 64\)"),
        (2, lambda z: z[0], {}, r"a tensor of \(2, 64, 64\)"),
        (2, lambda z: z.to(torch.complex64), {}, "complex numbers"),
        (1, lambda z: z, {"threshold": 1.0}, "between 0 and 1"),
        (1, lambda z: z, {"task": "vibes"}, "task must be one of multiclass, binary"),
    ],
)
def test_what_cannot_be_is_refused_by_name(channels: int, finish: Finish, said: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        meaning(finish, channels, **said)


def test_half_precision_is_refused_with_what_helps() -> None:
    with pytest.raises(UsageError, match=r"holds float16 weights.* call .float\(\)"):
        find_meaning(Ended(2).half(), 1, "net", Statement())


def test_a_look_at_a_network_in_training_leaves_its_statistics() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    find_meaning(network, 1, "net", Statement())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    assert network.training


# Outputs


def model_of(network: nn.Module, classes: int, **said: Any) -> SegmentationModel:
    return SegmentationModel(
        name="net",
        network=network.eval(),
        bands=("pan",),
        scaling=Scaling.z_score(mean=(120.0,), stddev=(40.0,)),
        fill=(0.0,),
        classes=tuple(SegmentationClass(name=f"c{value}", colour=(value % 256, 1, 2)) for value in range(classes)),
        **said,
    )


IMAGE = torch.randint(0, 256, (1, 1, 61, 53), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)


def values_of(network: nn.Module) -> Tensor:
    with torch.no_grad():
        return network((IMAGE.float() - 120) / 40)


@pytest.mark.parametrize("threshold", [0.5, 0.3, 0.8, 0.01])
@pytest.mark.parametrize("finish", [lambda z: z, torch.sigmoid], ids=["logits", "probabilities"])
def test_one_channel_is_a_question_of_yes_and_no(finish: Finish, threshold: float) -> None:
    network = Ended(1, finish)
    model = model_of(network, 2, threshold=threshold)
    values = values_of(network).double()
    share = values if finish is torch.sigmoid else values.sigmoid()
    assert 0 < (share > threshold).float().mean() < 1
    found = as_tile_network(model, "class")(IMAGE)
    assert found.dtype == torch.uint8
    assert torch.equal(found, (share > threshold).to(torch.uint8))
    levels = as_stored(as_tile_network(model, "probability")(IMAGE)[0].numpy(), None)
    assert levels.shape[0] == 1
    assert np.abs(levels - (share * 254).round().numpy()[0]).max() <= 1
    assert describe_output(model, "class").threshold == threshold
    refused = pytest.raises(UsageError, match="254 steps")
    with refused if finish is torch.sigmoid else contextlib.nullcontext():
        assert torch.equal(as_tile_network(model, "logits")(IMAGE), values_of(network))


@pytest.mark.parametrize("threshold", [0.5, 0.1, 0.3, 1 / 3, 0.7, 0.9, 0.999, 1e-6])
@pytest.mark.parametrize("activation", ["none", "sigmoid"])
def test_the_bound_is_exact_for_every_value_that_a_type_holds(threshold: float, activation: str) -> None:
    found = find_meaning(
        Ended(1, torch.sigmoid if activation == "sigmoid" else lambda z: z), 1, "net", Statement(threshold=threshold)
    )
    exact = threshold if activation == "sigmoid" else float(np.log(threshold) - np.log1p(-threshold))
    near = np.float32(exact)
    values = np.array([np.nextafter(near, np.float32(-9)), near, np.nextafter(near, np.float32(9))], np.float32)
    tensor = torch.from_numpy(values)
    assert (tensor > found.bound(torch.float32)).tolist() == [float(value) > exact for value in values]
    assert (tensor.double() > found.bound(torch.float64)).tolist() == [float(value) > exact for value in values]


def test_a_softmax_in_the_network_is_not_applied_again() -> None:
    network = Ended(3, lambda z: z.softmax(1))
    model, share = model_of(network, 3), values_of(network).double()
    levels = as_stored(as_tile_network(model, "probability")(IMAGE)[0].numpy(), None)
    assert np.abs(levels - (share * 254).round().numpy()[0]).max() <= 1
    assert levels.max() > 240
    assert torch.equal(as_tile_network(model, "class")(IMAGE)[0, 0].long(), share.argmax(1)[0])
    assert torch.equal(as_tile_network(model, "values")(IMAGE).double(), share)
    with pytest.raises(UsageError, match="softmax is in the network"):
        as_tile_network(model, "logits")


def test_the_logarithm_of_a_softmax_is_as_good_as_logits() -> None:
    network = Ended(3, lambda z: F.log_softmax(z, 1))
    levels = as_tile_network(model_of(network, 3), "probability")(IMAGE)
    assert (levels.double() - (values_of(network).double().exp() * 254).round()).abs().max() <= 1


@pytest.mark.parametrize(
    "finish",
    [
        lambda z: z.argmax(1),
        lambda z: z.argmax(1, keepdim=True).float(),
        lambda z: z.argmax(1)[:, None].to(torch.uint8),
        lambda z: z.max(1, keepdim=True).indices,
    ],
    ids=["int64 without its dimension", "float32", "uint8", "indices"],
)
def test_class_numbers_of_the_network_are_its_classes(finish: Finish) -> None:
    network = Ended(3, finish)
    model = model_of(network, 3)
    found = as_stored(as_tile_network(model)(IMAGE)[0].numpy(), None)
    assert found.dtype == np.uint8
    assert set(np.unique(found)) == {0, 1, 2}
    assert np.array_equal(found, values_of(Ended(3)).argmax(1).numpy())
    for output in ("probability", "logits"):
        with pytest.raises(UsageError, match="leave the argmax out"):
            as_tile_network(model, output)


def test_classes_beyond_bytes_are_stored_in_two() -> None:
    network = Ended(300)
    expected = values_of(network).argmax(1).numpy()
    assert expected.max() > 255
    for each in (network, Ended(300, lambda z: z.argmax(1))):
        result = as_tile_network(model_of(each, 300), "class")(IMAGE)[0].numpy()
        found = as_stored(result, np.zeros(result.shape[1:], bool))
        assert found.dtype == np.uint16
        assert np.array_equal(found, expected)
    assert output_nodata(np.dtype(np.uint16)) == 65535
    assert as_tile_network(model_of(Ended(255), 255), "class")(IMAGE).dtype == torch.uint8


def test_numbers_that_are_no_class_are_refused_where_they_count() -> None:
    network = Ended(3, lambda z: z.argmax(1) - 1)
    model = model_of(network, 3)
    numbers = as_tile_network(model)(IMAGE)[0].numpy()
    assert numbers.min() == -1
    with pytest.raises(OutputError, match=r"must be 0..254, got -1..1"):
        as_stored(numbers.copy(), None)
    found = as_stored(numbers.copy(), numbers[0] == -1)
    assert np.array_equal(found == 255, numbers == -1)
    # 255 is nodata, and no class of a network of bytes.
    bytes_ = model_of(Ended(1, lambda z: torch.full_like(z, 255).to(torch.uint8)), 0, activation="argmax")
    with pytest.raises(OutputError, match="what is no class"):
        as_stored(as_tile_network(bytes_)(IMAGE)[0].numpy(), None)


def test_probabilities_that_are_none_are_refused() -> None:
    model = model_of(Ended(1, lambda z: torch.relu(z) + 0.5), 2, task="binary", activation="sigmoid")
    levels = as_tile_network(model, "probability")(IMAGE)[0].numpy()
    with pytest.raises(OutputError, match="no probability"):
        as_stored(levels, None)


def test_questions_of_their_own_have_probabilities_and_no_one_class() -> None:
    for finish in (lambda z: z, torch.sigmoid):
        network = Ended(3, finish)
        model = model_of(network, 3, task="multilabel")
        share = values_of(Ended(3)).double().sigmoid()
        levels = as_stored(as_tile_network(model, "probability")(IMAGE)[0].numpy(), None)
        assert np.abs(levels - (share * 254).round().numpy()[0]).max() <= 1
        with pytest.raises(UsageError, match="3 questions of their own"):
            as_tile_network(model, "class")
    exclusive = model_of(Ended(3, torch.sigmoid), 3, task="multiclass")
    found = as_tile_network(exclusive, "class")(IMAGE)[0, 0]
    assert torch.equal(found.long(), values_of(exclusive.network).argmax(1)[0])


def test_a_regression_writes_its_values_and_nothing_else() -> None:
    network = Ended(2)
    model = model_of(network, 2, task="regression")
    assert default_output(model) == "values"
    assert torch.equal(as_tile_network(model)(IMAGE), values_of(network))
    for output in ("class", "probability", "logits"):
        with pytest.raises(UsageError, match="--output values"):
            as_tile_network(model, output)
    assert describe_output(model).kind == "values"


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_half_and_double_results_lose_nothing(dtype: torch.dtype) -> None:
    network = Ended(3, lambda z: z.to(dtype))
    logits = values_of(network).double()
    levels = as_tile_network(model_of(network, 3), "probability")(IMAGE)
    assert (levels.double() - (logits.softmax(1) * 254).round()).abs().max() <= 1
    assert torch.equal(as_tile_network(model_of(network, 3))(IMAGE)[0, 0].long(), logits.argmax(1)[0])


def test_a_network_of_doubles_computes_in_doubles() -> None:
    network = Ended(2).double()
    found = as_tile_network(model_of(network, 2), "logits")(IMAGE)
    assert found.dtype == torch.float64
    with torch.no_grad():
        assert torch.equal(found, network((IMAGE.double() - 120) / 40))


def test_the_yes_alone_may_be_named() -> None:
    found = meaning(lambda z: z, 1)
    no, yes = fit_classes((SegmentationClass(name="cloud", colour=(1, 2, 3)),), found, "net")
    assert (no.name, yes.name) == ("not cloud", "cloud")
    with pytest.raises(UsageError, match="names 3 classes, its network gives 1 channel, which are 2 classes"):
        fit_classes(name_classes(meaning(lambda z: z, 3)), found, "net")
    assert len(name_classes(meaning(lambda z: (9 * z).long(), 1))) == 0


def test_another_threshold_is_another_network_that_cannot_be_traced_too() -> None:
    one, other = (as_tile_network(model_of(Ended(1), 2, threshold=share)) for share in (0.4, 0.6))
    assert str(one) != str(other)
    plain = as_tile_network(model_of(Ended(2), 2))
    assert plain.extra_repr() == ""
    assert meaning_of(model_of(Ended(1), 2)).threshold == 0.5


def test_what_torch_gives_is_stored_so_that_all_values_fit() -> None:
    names = {"torch.uint8": "uint8", "torch.int16": "uint8", "torch.int32": "uint16", "torch.int64": "uint16"}
    names |= {"torch.float32": "float32", "torch.float64": "float64", "torch.bool": "uint8"}
    assert {name: str(stored_dtype(name)) for name in names} == names
