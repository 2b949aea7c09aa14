"""Models by name and by import path, on every row shape they promise."""

import itertools
import math
import sys
import types

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from fedmeta.errors import FedmetaError
from fedmeta.models import MODELS, FunctionalModel, build
from fedmeta.task import Rows

IMAGES = [(28, 28), (1, 28, 28), (3, 28, 28), (28, 28, 1), (28, 28, 3)]


def outputs(module: nn.Module, shape: tuple[int, ...], rows: int = 2) -> Tensor:
    model = FunctionalModel(module)
    return model(model.init(0), torch.randn(rows, *shape))


@given(shape=st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple), classes=st.integers(1, 4))
@settings(max_examples=15, deadline=None)
@pytest.mark.parametrize("name", ["logistic", "mlp"])
def test_flat_models_take_rows_of_any_shape(name: str, shape: tuple[int, ...], classes: int) -> None:
    module = build(name, shape, classes, hidden="6,4")
    assert outputs(module, shape).shape == (2, classes)
    sizes = [math.prod(shape), *([6, 4] if name == "mlp" else []), classes]
    expected = sum((a + 1) * b for a, b in itertools.pairwise(sizes))
    assert sum(value.numel() for value in module.parameters()) == expected


@pytest.mark.parametrize("shape", IMAGES)
@pytest.mark.parametrize("norm", ["none", "layer", "group"])
def test_cnn_takes_images_of_any_layout(shape: tuple[int, ...], norm: str) -> None:
    assert outputs(build("cnn", shape, 5, channels=(3, 4), kernel=3, dense=6, norm=norm), shape).shape == (2, 5)


def test_cnn_of_the_paper_has_its_size() -> None:
    sizes = [value.numel() for name, value in build("cnn", (28, 28), 62).named_parameters() if name.endswith("weight")]
    assert sizes == [25 * 32, 25 * 32 * 64, 7 * 7 * 64 * 2048, 2048 * 62]


@pytest.mark.parametrize("shape", IMAGES)
def test_conv4_takes_images_of_any_layout(shape: tuple[int, ...]) -> None:
    assert outputs(build("conv4", shape, 5, filters=16), shape).shape == (2, 5)


def test_conv4_of_the_papers_has_its_size_and_a_norm_of_groups() -> None:
    module = build("conv4", (28, 28), 5)
    sizes = {name: value.numel() for name, value in module.named_parameters() if value.dim() > 1}
    assert list(sizes.values()) == [9 * 64, 9 * 64 * 64, 9 * 64 * 64, 9 * 64 * 64, 64 * 5]
    assert [layer.num_groups for layer in module.modules() if isinstance(layer, nn.GroupNorm)] == [4] * 4
    bare = build("conv4", (28, 28), 5, norm="none")
    assert not any(isinstance(layer, nn.GroupNorm) for layer in bare.modules())


def as_torch_lstm(module: nn.Module, widths: list[int]) -> list[nn.LSTM]:
    """Torch's own LSTM layers with the weights of ours."""
    layers = []
    ours = [layer for layer in module if hasattr(layer, "recurrent")]
    for layer, (width, size) in zip(ours, itertools.pairwise(widths), strict=True):
        lstm = nn.LSTM(width, size, batch_first=True).double()
        lstm.weight_ih_l0.data, lstm.weight_hh_l0.data = layer.inputs.weight.data, layer.recurrent.weight.data
        lstm.bias_ih_l0.data = layer.inputs.bias.data.clone()
        lstm.bias_ih_l0.data[size : 2 * size] += 1.0
        lstm.bias_hh_l0.data.zero_()
        layers.append(lstm)
    return layers


def test_char_lstm_is_torchs_lstm() -> None:
    module = build("char_lstm", (7,), 11, hidden="6,5", embedding=3).double()
    x = torch.randint(11, (4, 7))
    states = module[0](x)
    for lstm in as_torch_lstm(module, [3, 6, 5]):
        states, _ = lstm(states)
    expected = module[-1](states[:, -1])
    assert torch.allclose(module(x), expected, rtol=1e-12, atol=1e-14)


def test_char_lstm_may_read_more_symbols_than_it_predicts() -> None:
    module = build("char_lstm", (3,), 2, hidden="4", symbols=9)
    assert module(torch.tensor([[8, 7, 6]])).shape == (1, 2)
    assert module(torch.zeros(0, 3, dtype=torch.long)).shape == (0, 2)
    with pytest.raises(FedmetaError, match="needs rows of symbol codes"):
        build("char_lstm", (3, 3), 2)


def test_channels_first_and_last_are_the_same_image() -> None:
    first, last = (FunctionalModel(build("cnn", shape, 2, channels=(2,), dense=3)) for shape in ((3, 8, 9), (8, 9, 3)))
    x = torch.randn(4, 3, 8, 9)
    assert bool((first(first.init(0), x) == last(last.init(0), x.movedim(1, 3))).all())


@pytest.mark.parametrize("norm", ["layer", "group"])
def test_norms_stand_before_each_activation(norm: str) -> None:
    kinds = [type(layer).__name__ for layer in build("mlp", (4,), 2, hidden=(32, 8), norm=norm)]
    assert kinds == ["Flatten", "Linear", "GroupNorm", "ReLU", "Linear", "GroupNorm", "ReLU", "Linear"]
    wide = build("mlp", (4,), 2, hidden=(32,), norm=norm)[2]
    assert wide.num_groups == (1 if norm == "layer" else 2)


def test_a_row_does_not_see_the_other_rows_of_its_batch() -> None:
    for name in ("mlp", "cnn"):
        model = FunctionalModel(build(name, (8, 8), 3, hidden="8", channels="4", dense=8, norm="group"))
        parameters, x = model.init(0), torch.randn(3, 8, 8)
        alone = torch.cat([model(parameters, row[None]) for row in x])
        assert torch.allclose(model(parameters, x), alone, atol=1e-6)


def test_an_image_too_small_reports_what_to_change() -> None:
    with pytest.raises(FedmetaError, match=r"3 x 9 pixels are too few for 2 of them; list fewer in model\.channels"):
        build("cnn", (3, 9), 2)
    assert outputs(build("cnn", (4, 4), 2, dense=3), (4, 4)).shape == (2, 2)
    with pytest.raises(
        FedmetaError, match=r'"conv4" halves an image .* 8 x 8 pixels are too few for 4 of them; take "cnn"'
    ):
        build("conv4", (8, 8), 2)
    with pytest.raises(FedmetaError, match="needs images"):
        build("cnn", (64,), 2)


def test_an_unknown_model_or_key_names_the_nearest() -> None:
    with pytest.raises(FedmetaError, match='no model "mpl"; did you mean "mlp"'):
        build("mpl", (4,), 2)
    for key, value in (("activation", "rleu"), ("norm", "batch")):
        with pytest.raises(FedmetaError, match=f"model.{key}"):
            build("mlp", (4,), 2, hidden=(4,), **{key: value})


@pytest.fixture
def user(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    module = types.ModuleType("users_models")
    module.__dict__.update(
        good=lambda shape, outputs, width=3: nn.Sequential(nn.Linear(shape[0], width), nn.Linear(width, outputs)),
        batch_norm=lambda shape, outputs: nn.Sequential(nn.BatchNorm1d(shape[0]), nn.Linear(shape[0], outputs)),
        wrong=lambda shape, outputs: "a text",
        failing=lambda shape, outputs: nn.Linear(shape[0], -1),
    )
    monkeypatch.setitem(sys.modules, "users_models", module)
    return module


@pytest.mark.usefixtures("user")
def test_a_model_by_import_path_gets_its_own_keys() -> None:
    assert outputs(build("users_models:good", (4,), 2, width=7), (4,)).shape == (2, 2)
    with pytest.raises(FedmetaError, match="unexpected keyword argument 'depth'"):
        build("users_models:good", (4,), 2, depth=7)
    with pytest.raises(FedmetaError, match="cannot be imported"):
        build("users_models:absent", (4,), 2)
    with pytest.raises(FedmetaError, match="cannot be imported"):
        build("no_such_module:good", (4,), 2)
    with pytest.raises(FedmetaError, match=r"returned str, not a torch\.nn\.Module"):
        build("users_models:wrong", (4,), 2)
    with pytest.raises(FedmetaError, match="users_models:failing"):
        build("users_models:failing", (4,), 2)


@pytest.mark.usefixtures("user")
def test_running_statistics_are_refused_with_the_reason() -> None:
    with pytest.raises(FedmetaError, match=r"BatchNorm1d.*leak test rows.*GroupNorm"):
        build("users_models:batch_norm", (4,), 2)
    with pytest.raises(FedmetaError, match="running batch statistics"):
        FunctionalModel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)))
    with pytest.raises(FedmetaError, match="normalises by the statistics of a batch"):
        FunctionalModel(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4, track_running_stats=False)))
    with pytest.raises(FedmetaError, match=r"InstanceNorm1d.*running batch statistics"):
        FunctionalModel(nn.Sequential(nn.Conv1d(1, 1, 1), nn.InstanceNorm1d(1, track_running_stats=True)))
    by_row = FunctionalModel(nn.Sequential(nn.Conv1d(1, 2, 1), nn.InstanceNorm1d(2, affine=True)))
    assert by_row.names == ("0.weight", "0.bias", "1.weight", "1.bias")


def test_a_tied_weight_is_one_parameter() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Embedding(5, 3)
            self.decoder = nn.Linear(3, 5, bias=False)
            self.decoder.weight = self.embedding.weight

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.decoder(self.embedding(x)[:, -1])
            return result

    model = FunctionalModel(Tied())
    assert model.names == ("embedding.weight",)
    weight, x = torch.randn(5, 3), torch.tensor([[1, 2], [3, 4]])
    assert torch.allclose(model({"embedding.weight": weight}, x), weight[[2, 4]] @ weight.T)


def test_a_model_without_parameters_is_refused() -> None:
    with pytest.raises(FedmetaError, match="no trainable parameter"):
        FunctionalModel(nn.Flatten())


def test_dropout_is_off_and_frozen_parameters_stay() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5), nn.Linear(4, 2))
    module[0].weight.requires_grad_(False)
    model = FunctionalModel(module)
    assert model.names == ("0.bias", "2.weight", "2.bias")
    x = torch.randn(3, 4)
    assert bool((model(model.init(0), x) == model(model.init(0), x)).all())


def test_buffers_and_frozen_parameters_follow_the_precision() -> None:
    class Shifted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("shift", torch.ones(4))
            self.frozen = nn.Parameter(torch.eye(4), requires_grad=False)
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            result: Tensor = self.linear((x + self.shift) @ self.frozen)
            return result

    model = FunctionalModel(Shifted())
    parameters = {name: value.double() for name, value in model.init(0).items()}
    assert model(parameters, torch.randn(3, 4)).dtype == torch.float64


def test_an_output_that_is_no_tensor_is_reported() -> None:
    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Rows:
            return self.linear(x), x

    model = FunctionalModel(Pair())
    with pytest.raises(FedmetaError, match="returned tuple; it must return one tensor"):
        model(model.init(0), torch.randn(3, 4))


def test_every_named_model_is_redrawn_by_seed() -> None:
    for name in MODELS:
        shape = (16,) if name == "char_lstm" else (16, 16)
        model = FunctionalModel(build(name, shape, 2, hidden="4", dense=4, channels="2,2", filters=2))
        first, again, other = model.init(1), model.init(1), model.init(2)
        assert all(bool((first[key] == again[key]).all()) for key in first)
        assert any(not bool((first[key] == other[key]).all()) for key in first)


@pytest.mark.parametrize("norm", ["none", "layer", "group"])
@pytest.mark.parametrize("name", ["mlp", "cnn", "conv4"])
def test_no_rows_give_no_outputs_and_a_gradient_of_zeros(name: str, norm: str) -> None:
    model = FunctionalModel(build(name, (16, 16), 3, hidden="8", channels="4", dense=8, filters=4, norm=norm))
    slopes = torch.func.grad(lambda own: model(own, torch.zeros(0, 16, 16)).sum())(model.init(0))
    assert all(float(value.abs().max()) == 0 for value in slopes.values())
