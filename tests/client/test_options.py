"""The options of a call: what is refused, and what each of them says on the wire."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, get_type_hints

import numpy as np
import pytest

from dinov3_client import ExtractOptions, Fit, Layer, Pooling, View, _views
from dinov3_client._model import read_model
from dinov3_client._request import check_options
from dinov3_client.testing import MODEL
from dinov3_client.testing._model import message_of
from dinov3_serving.v1 import feature_service_pb2 as pb

WRONG: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"outputs": None}, TypeError, "outputs is None; name one or several of 'cls', 'patches', 'registers'"),
    ({"outputs": ("cls", "tokens")}, ValueError, "outputs has 'tokens'; allowed are 'cls', 'patches', 'registers'"),
    ({"outputs": ()}, ValueError, "outputs is empty; name at least one of 'cls', .*or give layers with outputs of th"),
    ({"outputs": (), "layers": 3}, ValueError, "outputs is empty"),
    ({"outputs": (), "layers": (Layer(3, "cls"), 4)}, ValueError, "outputs is empty"),
    ({"exif": "no"}, TypeError, "exif is 'no'; allowed are True and False"),
    ({"allow_truncated": "no"}, TypeError, "allow_truncated is 'no'; allowed are True and False"),
    ({"fit": "cover"}, ValueError, "fit has 'cover'; allowed are 'stretch', 'crop', 'pad'"),
    (
        {"background": (1, 2, 256)},
        ValueError,
        r"background is \(1, 2, 256\); it must be \(red, green, blue\), 0 to 255",
    ),
    ({"background": (1, 2)}, ValueError, r"background is \(1, 2\)"),
    ({"background": "#01020304"}, ValueError, "background is '#01020304'"),
    ({"background": "pinkish"}, ValueError, "background is 'pinkish'; .*text such as 'white', '#7c7468'"),
    ({"background": 7}, ValueError, "background is 7"),
    ({"channels_first": 1}, TypeError, "channels_first is 1; allowed are True and False"),
    ({"preset": "imagenet"}, ValueError, "preset has 'imagenet'; allowed are 'dinov3', 'hf', 'none'"),
    ({"dtype": "int4"}, ValueError, "dtype has 'int4'; allowed are 'float32', 'float16', 'bfloat16', 'int8'"),
    ({"interpolation": "box"}, ValueError, "interpolation has 'box'; allowed are 'nearest'"),
    ({"priority": "high"}, ValueError, "priority has 'high'; allowed are 'interactive', 'bulk'"),
    ({"on_error": "ignore"}, ValueError, "on_error has 'ignore'; allowed are 'raise', 'return'"),
    ({"size": 0}, ValueError, "size is 0; it must be a number of pixels from 1 to"),
    ({"size": (224, -1)}, ValueError, r"size is \(224, -1\)"),
    ({"size": 2**32}, ValueError, "size is 4294967296; it must be a number of pixels from 1 to 4294967295"),
    ({"size": (224, 224, 3)}, ValueError, r"size is \(224, 224, 3\)"),
    ({"size": 224.0}, ValueError, r"size is 224\.0"),
    ({"layers": 2**32}, ValueError, "layers has 4294967296; no model has so many layers"),
    ({"layers": (1.5,)}, TypeError, r"layers has 1\.5; allowed are Layer and layer numbers"),
    ({"layers": "3"}, TypeError, "layers has '3'"),
    ({"layers": (3, 3)}, ValueError, r"layers \[3, 3\] name a layer twice"),
    ({"layers": (3, Layer(3, norm=False))}, ValueError, r"layers \[3, 3\] name a layer twice"),
    ({"layers": (11, -1)}, ValueError, r"layers \[11, -1\] name a layer twice: they are layers \[11, 11\]"),
    ({"layers": (-13,)}, ValueError, "layers has -13; the model has 12 layers: allowed are -12 to 11"),
    ({"layers": 12}, ValueError, "layers has 12; the model has 12 layers"),
    ({"pooling": 7}, ValueError, r"pooling's grid is 7; it must be \(rows, columns\), both at least 1"),
    ({"pooling": (7, 0)}, ValueError, r"pooling's grid is \(7, 0\)"),
    ({"pooling": (7, 7, 7)}, ValueError, r"pooling's grid is \(7, 7, 7\)"),
    ({"pooling": "77"}, ValueError, "pooling's grid is '77'"),
    ({"projection": 3}, TypeError, r"projection is 3; it must be the name of one of model\(\)\.projections, or None"),
    ({"projection": ""}, TypeError, "projection is ''"),
    ({"deadline": 0}, ValueError, "deadline is 0; it must be a positive number of seconds"),
    ({"deadline": "5"}, TypeError, "deadline is '5'; it must be a positive number of seconds"),
    ({"deadline": float("nan")}, ValueError, "deadline is nan"),
    ({"batch_size": 3}, TypeError, "there is no option 'batch_size'; the options are preset, size, dtype, layers, "),
]


@pytest.mark.parametrize(("given", "kind", "message"), WRONG, ids=[str(given) for given, _, _ in WRONG])
def test_wrong_options_are_named(given: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        check_options(**given).message(MODEL)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (lambda: Layer("3"), TypeError, "layers has '3'"),  # type: ignore[arg-type]
        (lambda: Layer(3, ()), ValueError, "outputs of layer 3 is empty; name at least one of 'cls'"),
        (lambda: Layer(3, "token"), ValueError, "outputs has 'token'"),  # type: ignore[arg-type]
        (lambda: Layer(3, norm=None), TypeError, "norm is None; allowed are True and False"),  # type: ignore[arg-type]
        (lambda: Pooling((7, 7), "max"), ValueError, "pooling's method has 'max'; allowed are 'area', 'bilinear'"),  # type: ignore[arg-type]
    ],
)
def test_wrong_layers_and_poolings_are_named_where_they_are_made(
    make: Any, kind: type[Exception], message: str
) -> None:
    with pytest.raises(kind, match=message):
        make()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "fill"}, "fit's method has 'fill'; allowed are 'stretch', 'crop', 'pad'"),
        ({"pad_color": "white"}, "pad_color is given for fit 'stretch'; only \"pad\" has borders"),
        ({"method": "crop", "pad_color": (0, 0, 0)}, "pad_color is given for fit 'crop'"),
        ({"method": "pad", "pad_color": (0, 0, -1)}, r"pad_color is \(0, 0, -1\)"),
        ({"method": "pad", "resize_shorter": 256}, "resize_shorter is given for fit 'pad'; only \"crop\""),
        ({"method": "crop", "resize_shorter": 0}, "resize_shorter is 0; it must be a number of pixels, at least 1"),
    ],
)
def test_impossible_fits_are_refused_where_they_are_made(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Fit(**given)


def test_the_fit_of_a_view() -> None:
    assert not _views.message(View()).HasField("fit")
    assert _views.message(View(fit="stretch")).fit == pb.Fit(method=pb.FIT_METHOD_STRETCH)
    assert _views.message(View(fit=Fit("crop", resize_shorter=9))).fit == pb.Fit(method=2, resize_shorter=9)
    with pytest.raises(ValueError, match="fit has 'cover'"):
        View(fit="cover")  # type: ignore[arg-type]


def test_a_server_that_only_stretches() -> None:
    message = message_of(MODEL, 0)
    del message.fit_methods[:]
    old = read_model(message.SerializeToString())
    assert old.fit_methods == ("stretch",)
    check_options(fit="stretch").message(old)
    with pytest.raises(ValueError, match=r"fit is 'crop'; this server, version 0\.1\.0, only stretches"):
        check_options(fit="crop").message(old)


def preprocessing(**fields: Any) -> pb.ExtractRequest:
    return pb.ExtractRequest(preprocessing=pb.Preprocessing(**{"preset": pb.PRESET_DINOV3, **fields}))


def outputs(**fields: Any) -> pb.ExtractRequest:
    given = {"cls": True, "patches": True, "dtype": pb.DATA_TYPE_FLOAT16, **fields}
    return pb.ExtractRequest(outputs=pb.Outputs(**{name: value for name, value in given.items() if value is not None}))


# What an option changes in the request, beside the defaults.
ON_THE_WIRE: list[tuple[dict[str, Any], pb.ExtractRequest]] = [
    ({}, preprocessing()),
    ({}, outputs()),
    ({}, pb.ExtractRequest(priority=pb.PRIORITY_INTERACTIVE)),
    ({"preset": "hf"}, preprocessing(preset=pb.PRESET_HF)),
    ({"preset": "none"}, preprocessing(preset=pb.PRESET_NONE)),
    ({"size": 64}, preprocessing(size=pb.Size(height=64, width=64))),
    ({"size": (32, np.int64(64))}, preprocessing(size=pb.Size(height=32, width=64))),
    ({"size": None, "interpolation": None, "pooling": None, "projection": None, "deadline": None}, outputs()),
    ({"interpolation": "lanczos"}, preprocessing(interpolation=pb.INTERPOLATION_LANCZOS)),
    ({"exif": True}, preprocessing(apply_exif_orientation=True)),
    ({"fit": "stretch"}, preprocessing()),
    ({"fit": "crop"}, preprocessing(fit=pb.Fit(method=pb.FIT_METHOD_CROP))),
    ({"fit": Fit("crop", resize_shorter=256)}, preprocessing(fit=pb.Fit(method=2, resize_shorter=256))),
    (
        {"fit": Fit("pad", pad_color="white")},
        preprocessing(fit=pb.Fit(method=3, pad_color=pb.Color(red=255, green=255, blue=255))),
    ),
    ({"background": (1, 2, 3)}, preprocessing(background=pb.Color(red=1, green=2, blue=3))),
    ({"background": "#010203"}, preprocessing(background=pb.Color(red=1, green=2, blue=3))),
    ({"background": "black"}, preprocessing(background=pb.Color())),
    ({"allow_truncated": True}, preprocessing(allow_truncated=True)),
    ({"priority": "bulk"}, pb.ExtractRequest(priority=pb.PRIORITY_BULK)),
    ({"dtype": "float32"}, outputs(dtype=pb.DATA_TYPE_FLOAT32)),
    ({"dtype": "bfloat16"}, outputs(dtype=pb.DATA_TYPE_BFLOAT16)),
    ({"dtype": "int8"}, outputs(dtype=pb.DATA_TYPE_INT8)),
    ({"outputs": "registers"}, outputs(cls=None, patches=None, registers=True)),
    ({"outputs": ["registers", "cls"]}, outputs(patches=None, registers=True)),
    ({"layers": 2}, outputs(layers=[pb.LayerOutputs(layer=2, cls=True, patches=True)])),
    ({"layers": np.array([-1])}, outputs(layers=[pb.LayerOutputs(layer=11, cls=True, patches=True)])),
    (
        {"layers": (Layer(-2, "cls", norm=False), 0)},
        outputs(
            layers=[
                pb.LayerOutputs(layer=10, cls=True, skip_norm=True),
                pb.LayerOutputs(layer=0, cls=True, patches=True),
            ]
        ),
    ),
    (
        {"outputs": (), "layers": Layer(5, ("registers", "patches"))},
        outputs(cls=None, patches=None, layers=[pb.LayerOutputs(layer=5, patches=True, registers=True)]),
    ),
    (
        {"pooling": (7, 5)},
        outputs(pooling=pb.Pooling(grid_height=7, grid_width=5, method=pb.POOLING_METHOD_AREA)),
    ),
    (
        {"pooling": Pooling((7, 5), "bilinear")},
        outputs(pooling=pb.Pooling(grid_height=7, grid_width=5, method=pb.POOLING_METHOD_BILINEAR)),
    ),
    ({"projection": "pca64"}, outputs(projection="pca64")),
    ({"channels_first": True}, outputs(patch_layout=pb.PATCH_LAYOUT_CHANNELS_FIRST)),
]


@pytest.mark.parametrize(("given", "expected"), ON_THE_WIRE, ids=[str(given) for given, _ in ON_THE_WIRE])
def test_every_option_on_the_wire(given: dict[str, Any], expected: pb.ExtractRequest) -> None:
    message = check_options(**given).message(MODEL)
    for field, value in expected.ListFields():
        assert getattr(message, field.name) == value
    # And nothing else has changed.
    default = check_options().message(MODEL)
    changed = {field.name for field, _ in expected.ListFields()}
    for name in {"preprocessing", "outputs", "priority"} - changed:
        assert getattr(message, name) == getattr(default, name)
    assert not message.fingerprint


def test_every_option_is_in_the_table() -> None:
    named = {name for given, _ in ON_THE_WIRE for name in given} - {"outputs"}
    assert named == set(get_type_hints(ExtractOptions)) - {"on_error"}


def test_options_that_are_not_sent() -> None:
    wanted = check_options(on_error="return", deadline=3)
    assert (wanted.on_error, wanted.deadline) == ("return", 3)
    assert (check_options().on_error, check_options().deadline) == ("raise", None)


def test_numbers_and_pairs_of_any_kind() -> None:
    """float32 seconds, added to a clock's, are minutes off; a list equals no tuple."""
    wanted = check_options(deadline=np.float32(3), pooling=[np.int64(7), 5])  # type: ignore[arg-type]
    assert type(wanted.deadline) is float
    assert wanted.pooling == Pooling((7, 5))
    assert wanted.pooling.grid == (7, 5)


def test_layers_are_counted_from_the_end_of_the_model() -> None:
    wanted = check_options(layers=(-1, 0))
    assert wanted.layer_indices(MODEL) == (11, 0)
    assert wanted.layer_indices(replace(MODEL, layer_dims=(24,) * 4)) == (3, 0)
