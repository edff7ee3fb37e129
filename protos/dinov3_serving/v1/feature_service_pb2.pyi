from google.protobuf import any_pb2 as _any_pb2
from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from typing import ClassVar as _ClassVar, Iterable as _Iterable, Mapping as _Mapping, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class DataType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    DATA_TYPE_UNSPECIFIED: _ClassVar[DataType]
    DATA_TYPE_UINT8: _ClassVar[DataType]
    DATA_TYPE_FLOAT32: _ClassVar[DataType]
    DATA_TYPE_FLOAT16: _ClassVar[DataType]
    DATA_TYPE_BFLOAT16: _ClassVar[DataType]
    DATA_TYPE_INT8: _ClassVar[DataType]

class Preset(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRESET_UNSPECIFIED: _ClassVar[Preset]
    PRESET_DINOV3: _ClassVar[Preset]
    PRESET_HF: _ClassVar[Preset]
    PRESET_NONE: _ClassVar[Preset]

class Interpolation(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    INTERPOLATION_UNSPECIFIED: _ClassVar[Interpolation]
    INTERPOLATION_NEAREST: _ClassVar[Interpolation]
    INTERPOLATION_BILINEAR: _ClassVar[Interpolation]
    INTERPOLATION_BICUBIC: _ClassVar[Interpolation]
    INTERPOLATION_LANCZOS: _ClassVar[Interpolation]

class FitMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    FIT_METHOD_UNSPECIFIED: _ClassVar[FitMethod]
    FIT_METHOD_STRETCH: _ClassVar[FitMethod]
    FIT_METHOD_CROP: _ClassVar[FitMethod]
    FIT_METHOD_PAD: _ClassVar[FitMethod]

class PoolingMethod(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOLING_METHOD_UNSPECIFIED: _ClassVar[PoolingMethod]
    POOLING_METHOD_AREA: _ClassVar[PoolingMethod]
    POOLING_METHOD_BILINEAR: _ClassVar[PoolingMethod]

class PatchLayout(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PATCH_LAYOUT_UNSPECIFIED: _ClassVar[PatchLayout]
    PATCH_LAYOUT_TOKENS: _ClassVar[PatchLayout]
    PATCH_LAYOUT_CHANNELS_FIRST: _ClassVar[PatchLayout]

class Priority(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    PRIORITY_UNSPECIFIED: _ClassVar[Priority]
    PRIORITY_INTERACTIVE: _ClassVar[Priority]
    PRIORITY_BULK: _ClassVar[Priority]
DATA_TYPE_UNSPECIFIED: DataType
DATA_TYPE_UINT8: DataType
DATA_TYPE_FLOAT32: DataType
DATA_TYPE_FLOAT16: DataType
DATA_TYPE_BFLOAT16: DataType
DATA_TYPE_INT8: DataType
PRESET_UNSPECIFIED: Preset
PRESET_DINOV3: Preset
PRESET_HF: Preset
PRESET_NONE: Preset
INTERPOLATION_UNSPECIFIED: Interpolation
INTERPOLATION_NEAREST: Interpolation
INTERPOLATION_BILINEAR: Interpolation
INTERPOLATION_BICUBIC: Interpolation
INTERPOLATION_LANCZOS: Interpolation
FIT_METHOD_UNSPECIFIED: FitMethod
FIT_METHOD_STRETCH: FitMethod
FIT_METHOD_CROP: FitMethod
FIT_METHOD_PAD: FitMethod
POOLING_METHOD_UNSPECIFIED: PoolingMethod
POOLING_METHOD_AREA: PoolingMethod
POOLING_METHOD_BILINEAR: PoolingMethod
PATCH_LAYOUT_UNSPECIFIED: PatchLayout
PATCH_LAYOUT_TOKENS: PatchLayout
PATCH_LAYOUT_CHANNELS_FIRST: PatchLayout
PRIORITY_UNSPECIFIED: Priority
PRIORITY_INTERACTIVE: Priority
PRIORITY_BULK: Priority

class Tensor(_message.Message):
    __slots__ = ("dtype", "shape", "data", "scales")
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    DATA_FIELD_NUMBER: _ClassVar[int]
    SCALES_FIELD_NUMBER: _ClassVar[int]
    dtype: DataType
    shape: _containers.RepeatedScalarFieldContainer[int]
    data: bytes
    scales: bytes
    def __init__(self, dtype: _Optional[_Union[DataType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., data: _Optional[bytes] = ..., scales: _Optional[bytes] = ...) -> None: ...

class Image(_message.Message):
    __slots__ = ("encoded", "pixels", "views")
    ENCODED_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    VIEWS_FIELD_NUMBER: _ClassVar[int]
    encoded: bytes
    pixels: Tensor
    views: _containers.RepeatedCompositeFieldContainer[View]
    def __init__(self, encoded: _Optional[bytes] = ..., pixels: _Optional[_Union[Tensor, _Mapping]] = ..., views: _Optional[_Iterable[_Union[View, _Mapping]]] = ...) -> None: ...

class View(_message.Message):
    __slots__ = ("crop", "horizontal_flip", "size", "interpolation", "fit")
    CROP_FIELD_NUMBER: _ClassVar[int]
    HORIZONTAL_FLIP_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    crop: Box
    horizontal_flip: bool
    size: Size
    interpolation: Interpolation
    fit: Fit
    def __init__(self, crop: _Optional[_Union[Box, _Mapping]] = ..., horizontal_flip: bool = ..., size: _Optional[_Union[Size, _Mapping]] = ..., interpolation: _Optional[_Union[Interpolation, str]] = ..., fit: _Optional[_Union[Fit, _Mapping]] = ...) -> None: ...

class Box(_message.Message):
    __slots__ = ("top", "left", "height", "width")
    TOP_FIELD_NUMBER: _ClassVar[int]
    LEFT_FIELD_NUMBER: _ClassVar[int]
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    top: int
    left: int
    height: int
    width: int
    def __init__(self, top: _Optional[int] = ..., left: _Optional[int] = ..., height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Size(_message.Message):
    __slots__ = ("height", "width")
    HEIGHT_FIELD_NUMBER: _ClassVar[int]
    WIDTH_FIELD_NUMBER: _ClassVar[int]
    height: int
    width: int
    def __init__(self, height: _Optional[int] = ..., width: _Optional[int] = ...) -> None: ...

class Fit(_message.Message):
    __slots__ = ("method", "pad_color", "resize_shorter")
    METHOD_FIELD_NUMBER: _ClassVar[int]
    PAD_COLOR_FIELD_NUMBER: _ClassVar[int]
    RESIZE_SHORTER_FIELD_NUMBER: _ClassVar[int]
    method: FitMethod
    pad_color: Color
    resize_shorter: int
    def __init__(self, method: _Optional[_Union[FitMethod, str]] = ..., pad_color: _Optional[_Union[Color, _Mapping]] = ..., resize_shorter: _Optional[int] = ...) -> None: ...

class Color(_message.Message):
    __slots__ = ("red", "green", "blue")
    RED_FIELD_NUMBER: _ClassVar[int]
    GREEN_FIELD_NUMBER: _ClassVar[int]
    BLUE_FIELD_NUMBER: _ClassVar[int]
    red: int
    green: int
    blue: int
    def __init__(self, red: _Optional[int] = ..., green: _Optional[int] = ..., blue: _Optional[int] = ...) -> None: ...

class Preprocessing(_message.Message):
    __slots__ = ("preset", "size", "interpolation", "apply_exif_orientation", "fit", "background", "allow_truncated")
    PRESET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    APPLY_EXIF_ORIENTATION_FIELD_NUMBER: _ClassVar[int]
    FIT_FIELD_NUMBER: _ClassVar[int]
    BACKGROUND_FIELD_NUMBER: _ClassVar[int]
    ALLOW_TRUNCATED_FIELD_NUMBER: _ClassVar[int]
    preset: Preset
    size: Size
    interpolation: Interpolation
    apply_exif_orientation: bool
    fit: Fit
    background: Color
    allow_truncated: bool
    def __init__(self, preset: _Optional[_Union[Preset, str]] = ..., size: _Optional[_Union[Size, _Mapping]] = ..., interpolation: _Optional[_Union[Interpolation, str]] = ..., apply_exif_orientation: bool = ..., fit: _Optional[_Union[Fit, _Mapping]] = ..., background: _Optional[_Union[Color, _Mapping]] = ..., allow_truncated: bool = ...) -> None: ...

class Outputs(_message.Message):
    __slots__ = ("cls", "patches", "registers", "layers", "dtype", "pooling", "projection", "patch_layout")
    CLS_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    REGISTERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    POOLING_FIELD_NUMBER: _ClassVar[int]
    PROJECTION_FIELD_NUMBER: _ClassVar[int]
    PATCH_LAYOUT_FIELD_NUMBER: _ClassVar[int]
    cls: bool
    patches: bool
    registers: bool
    layers: _containers.RepeatedCompositeFieldContainer[LayerOutputs]
    dtype: DataType
    pooling: Pooling
    projection: str
    patch_layout: PatchLayout
    def __init__(self, cls: bool = ..., patches: bool = ..., registers: bool = ..., layers: _Optional[_Iterable[_Union[LayerOutputs, _Mapping]]] = ..., dtype: _Optional[_Union[DataType, str]] = ..., pooling: _Optional[_Union[Pooling, _Mapping]] = ..., projection: _Optional[str] = ..., patch_layout: _Optional[_Union[PatchLayout, str]] = ...) -> None: ...

class Pooling(_message.Message):
    __slots__ = ("grid_height", "grid_width", "method")
    GRID_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    GRID_WIDTH_FIELD_NUMBER: _ClassVar[int]
    METHOD_FIELD_NUMBER: _ClassVar[int]
    grid_height: int
    grid_width: int
    method: PoolingMethod
    def __init__(self, grid_height: _Optional[int] = ..., grid_width: _Optional[int] = ..., method: _Optional[_Union[PoolingMethod, str]] = ...) -> None: ...

class LayerOutputs(_message.Message):
    __slots__ = ("layer", "cls", "patches", "registers", "skip_norm")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CLS_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    REGISTERS_FIELD_NUMBER: _ClassVar[int]
    SKIP_NORM_FIELD_NUMBER: _ClassVar[int]
    layer: int
    cls: bool
    patches: bool
    registers: bool
    skip_norm: bool
    def __init__(self, layer: _Optional[int] = ..., cls: bool = ..., patches: bool = ..., registers: bool = ..., skip_norm: bool = ...) -> None: ...

class ExtractRequest(_message.Message):
    __slots__ = ("images", "pixels", "preprocessing", "outputs", "priority", "model", "fingerprint")
    IMAGES_FIELD_NUMBER: _ClassVar[int]
    PIXELS_FIELD_NUMBER: _ClassVar[int]
    PREPROCESSING_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    PRIORITY_FIELD_NUMBER: _ClassVar[int]
    MODEL_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    images: _containers.RepeatedCompositeFieldContainer[Image]
    pixels: Tensor
    preprocessing: Preprocessing
    outputs: Outputs
    priority: Priority
    model: str
    fingerprint: str
    def __init__(self, images: _Optional[_Iterable[_Union[Image, _Mapping]]] = ..., pixels: _Optional[_Union[Tensor, _Mapping]] = ..., preprocessing: _Optional[_Union[Preprocessing, _Mapping]] = ..., outputs: _Optional[_Union[Outputs, _Mapping]] = ..., priority: _Optional[_Union[Priority, str]] = ..., model: _Optional[str] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class FeatureBlock(_message.Message):
    __slots__ = ("input_size", "grid_height", "grid_width", "image_indices", "view_indices", "cls", "patches", "registers", "layers")
    INPUT_SIZE_FIELD_NUMBER: _ClassVar[int]
    GRID_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    GRID_WIDTH_FIELD_NUMBER: _ClassVar[int]
    IMAGE_INDICES_FIELD_NUMBER: _ClassVar[int]
    VIEW_INDICES_FIELD_NUMBER: _ClassVar[int]
    CLS_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    REGISTERS_FIELD_NUMBER: _ClassVar[int]
    LAYERS_FIELD_NUMBER: _ClassVar[int]
    input_size: Size
    grid_height: int
    grid_width: int
    image_indices: _containers.RepeatedScalarFieldContainer[int]
    view_indices: _containers.RepeatedScalarFieldContainer[int]
    cls: Tensor
    patches: Tensor
    registers: Tensor
    layers: _containers.RepeatedCompositeFieldContainer[LayerFeatures]
    def __init__(self, input_size: _Optional[_Union[Size, _Mapping]] = ..., grid_height: _Optional[int] = ..., grid_width: _Optional[int] = ..., image_indices: _Optional[_Iterable[int]] = ..., view_indices: _Optional[_Iterable[int]] = ..., cls: _Optional[_Union[Tensor, _Mapping]] = ..., patches: _Optional[_Union[Tensor, _Mapping]] = ..., registers: _Optional[_Union[Tensor, _Mapping]] = ..., layers: _Optional[_Iterable[_Union[LayerFeatures, _Mapping]]] = ...) -> None: ...

class LayerFeatures(_message.Message):
    __slots__ = ("layer", "cls", "patches", "registers", "grid_height", "grid_width")
    LAYER_FIELD_NUMBER: _ClassVar[int]
    CLS_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    REGISTERS_FIELD_NUMBER: _ClassVar[int]
    GRID_HEIGHT_FIELD_NUMBER: _ClassVar[int]
    GRID_WIDTH_FIELD_NUMBER: _ClassVar[int]
    layer: int
    cls: Tensor
    patches: Tensor
    registers: Tensor
    grid_height: int
    grid_width: int
    def __init__(self, layer: _Optional[int] = ..., cls: _Optional[_Union[Tensor, _Mapping]] = ..., patches: _Optional[_Union[Tensor, _Mapping]] = ..., registers: _Optional[_Union[Tensor, _Mapping]] = ..., grid_height: _Optional[int] = ..., grid_width: _Optional[int] = ...) -> None: ...

class Status(_message.Message):
    __slots__ = ("code", "message", "details")
    CODE_FIELD_NUMBER: _ClassVar[int]
    MESSAGE_FIELD_NUMBER: _ClassVar[int]
    DETAILS_FIELD_NUMBER: _ClassVar[int]
    code: int
    message: str
    details: _containers.RepeatedCompositeFieldContainer[_any_pb2.Any]
    def __init__(self, code: _Optional[int] = ..., message: _Optional[str] = ..., details: _Optional[_Iterable[_Union[_any_pb2.Any, _Mapping]]] = ...) -> None: ...

class ImageError(_message.Message):
    __slots__ = ("image_index", "status")
    IMAGE_INDEX_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    image_index: int
    status: Status
    def __init__(self, image_index: _Optional[int] = ..., status: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class Timings(_message.Message):
    __slots__ = ("decode_seconds", "queue_seconds", "inference_seconds", "batch_images", "batches")
    DECODE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    QUEUE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    INFERENCE_SECONDS_FIELD_NUMBER: _ClassVar[int]
    BATCH_IMAGES_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    decode_seconds: float
    queue_seconds: float
    inference_seconds: float
    batch_images: int
    batches: int
    def __init__(self, decode_seconds: _Optional[float] = ..., queue_seconds: _Optional[float] = ..., inference_seconds: _Optional[float] = ..., batch_images: _Optional[int] = ..., batches: _Optional[int] = ...) -> None: ...

class ExtractResponse(_message.Message):
    __slots__ = ("blocks", "errors", "timings", "frontend", "fingerprint", "padding")
    BLOCKS_FIELD_NUMBER: _ClassVar[int]
    ERRORS_FIELD_NUMBER: _ClassVar[int]
    TIMINGS_FIELD_NUMBER: _ClassVar[int]
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    PADDING_FIELD_NUMBER: _ClassVar[int]
    blocks: _containers.RepeatedCompositeFieldContainer[FeatureBlock]
    errors: _containers.RepeatedCompositeFieldContainer[ImageError]
    timings: Timings
    frontend: int
    fingerprint: str
    padding: bytes
    def __init__(self, blocks: _Optional[_Iterable[_Union[FeatureBlock, _Mapping]]] = ..., errors: _Optional[_Iterable[_Union[ImageError, _Mapping]]] = ..., timings: _Optional[_Union[Timings, _Mapping]] = ..., frontend: _Optional[int] = ..., fingerprint: _Optional[str] = ..., padding: _Optional[bytes] = ...) -> None: ...

class ExtractStreamRequest(_message.Message):
    __slots__ = ("id", "request", "timeout_seconds")
    ID_FIELD_NUMBER: _ClassVar[int]
    REQUEST_FIELD_NUMBER: _ClassVar[int]
    TIMEOUT_SECONDS_FIELD_NUMBER: _ClassVar[int]
    id: int
    request: ExtractRequest
    timeout_seconds: float
    def __init__(self, id: _Optional[int] = ..., request: _Optional[_Union[ExtractRequest, _Mapping]] = ..., timeout_seconds: _Optional[float] = ...) -> None: ...

class ExtractStreamResponse(_message.Message):
    __slots__ = ("id", "response", "error")
    ID_FIELD_NUMBER: _ClassVar[int]
    RESPONSE_FIELD_NUMBER: _ClassVar[int]
    ERROR_FIELD_NUMBER: _ClassVar[int]
    id: int
    response: ExtractResponse
    error: Status
    def __init__(self, id: _Optional[int] = ..., response: _Optional[_Union[ExtractResponse, _Mapping]] = ..., error: _Optional[_Union[Status, _Mapping]] = ...) -> None: ...

class GetModelRequest(_message.Message):
    __slots__ = ()
    def __init__(self) -> None: ...

class ServerLimits(_message.Message):
    __slots__ = ("max_message_bytes", "max_images_per_request", "max_image_pixels", "max_image_tokens", "stream_window")
    MAX_MESSAGE_BYTES_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGES_PER_REQUEST_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_PIXELS_FIELD_NUMBER: _ClassVar[int]
    MAX_IMAGE_TOKENS_FIELD_NUMBER: _ClassVar[int]
    STREAM_WINDOW_FIELD_NUMBER: _ClassVar[int]
    max_message_bytes: int
    max_images_per_request: int
    max_image_pixels: int
    max_image_tokens: int
    stream_window: int
    def __init__(self, max_message_bytes: _Optional[int] = ..., max_images_per_request: _Optional[int] = ..., max_image_pixels: _Optional[int] = ..., max_image_tokens: _Optional[int] = ..., stream_window: _Optional[int] = ...) -> None: ...

class GetModelResponse(_message.Message):
    __slots__ = ("model", "weights", "random_weights", "fingerprint", "dtype", "devices", "embed_dim", "depth", "patch_size", "register_tokens", "mean", "std", "parameters", "limits", "frontends", "frontend", "server_version", "parity_check", "projections", "layer_dims", "layer_strides", "presets", "image_formats", "fit_methods")
    MODEL_FIELD_NUMBER: _ClassVar[int]
    WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    RANDOM_WEIGHTS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    DEVICES_FIELD_NUMBER: _ClassVar[int]
    EMBED_DIM_FIELD_NUMBER: _ClassVar[int]
    DEPTH_FIELD_NUMBER: _ClassVar[int]
    PATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    REGISTER_TOKENS_FIELD_NUMBER: _ClassVar[int]
    MEAN_FIELD_NUMBER: _ClassVar[int]
    STD_FIELD_NUMBER: _ClassVar[int]
    PARAMETERS_FIELD_NUMBER: _ClassVar[int]
    LIMITS_FIELD_NUMBER: _ClassVar[int]
    FRONTENDS_FIELD_NUMBER: _ClassVar[int]
    FRONTEND_FIELD_NUMBER: _ClassVar[int]
    SERVER_VERSION_FIELD_NUMBER: _ClassVar[int]
    PARITY_CHECK_FIELD_NUMBER: _ClassVar[int]
    PROJECTIONS_FIELD_NUMBER: _ClassVar[int]
    LAYER_DIMS_FIELD_NUMBER: _ClassVar[int]
    LAYER_STRIDES_FIELD_NUMBER: _ClassVar[int]
    PRESETS_FIELD_NUMBER: _ClassVar[int]
    IMAGE_FORMATS_FIELD_NUMBER: _ClassVar[int]
    FIT_METHODS_FIELD_NUMBER: _ClassVar[int]
    model: str
    weights: str
    random_weights: bool
    fingerprint: str
    dtype: DataType
    devices: _containers.RepeatedScalarFieldContainer[str]
    embed_dim: int
    depth: int
    patch_size: int
    register_tokens: int
    mean: _containers.RepeatedScalarFieldContainer[float]
    std: _containers.RepeatedScalarFieldContainer[float]
    parameters: int
    limits: ServerLimits
    frontends: int
    frontend: int
    server_version: str
    parity_check: ParityCheck
    projections: _containers.RepeatedCompositeFieldContainer[Projection]
    layer_dims: _containers.RepeatedScalarFieldContainer[int]
    layer_strides: _containers.RepeatedScalarFieldContainer[int]
    presets: _containers.RepeatedCompositeFieldContainer[PresetInfo]
    image_formats: _containers.RepeatedScalarFieldContainer[str]
    fit_methods: _containers.RepeatedScalarFieldContainer[FitMethod]
    def __init__(self, model: _Optional[str] = ..., weights: _Optional[str] = ..., random_weights: bool = ..., fingerprint: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., devices: _Optional[_Iterable[str]] = ..., embed_dim: _Optional[int] = ..., depth: _Optional[int] = ..., patch_size: _Optional[int] = ..., register_tokens: _Optional[int] = ..., mean: _Optional[_Iterable[float]] = ..., std: _Optional[_Iterable[float]] = ..., parameters: _Optional[int] = ..., limits: _Optional[_Union[ServerLimits, _Mapping]] = ..., frontends: _Optional[int] = ..., frontend: _Optional[int] = ..., server_version: _Optional[str] = ..., parity_check: _Optional[_Union[ParityCheck, _Mapping]] = ..., projections: _Optional[_Iterable[_Union[Projection, _Mapping]]] = ..., layer_dims: _Optional[_Iterable[int]] = ..., layer_strides: _Optional[_Iterable[int]] = ..., presets: _Optional[_Iterable[_Union[PresetInfo, _Mapping]]] = ..., image_formats: _Optional[_Iterable[str]] = ..., fit_methods: _Optional[_Iterable[_Union[FitMethod, str]]] = ...) -> None: ...

class PresetInfo(_message.Message):
    __slots__ = ("preset", "size", "interpolation")
    PRESET_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    INTERPOLATION_FIELD_NUMBER: _ClassVar[int]
    preset: Preset
    size: Size
    interpolation: Interpolation
    def __init__(self, preset: _Optional[_Union[Preset, str]] = ..., size: _Optional[_Union[Size, _Mapping]] = ..., interpolation: _Optional[_Union[Interpolation, str]] = ...) -> None: ...

class Projection(_message.Message):
    __slots__ = ("name", "input_channels", "output_channels", "fingerprint")
    NAME_FIELD_NUMBER: _ClassVar[int]
    INPUT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    OUTPUT_CHANNELS_FIELD_NUMBER: _ClassVar[int]
    FINGERPRINT_FIELD_NUMBER: _ClassVar[int]
    name: str
    input_channels: int
    output_channels: int
    fingerprint: str
    def __init__(self, name: _Optional[str] = ..., input_channels: _Optional[int] = ..., output_channels: _Optional[int] = ..., fingerprint: _Optional[str] = ...) -> None: ...

class ParityCheck(_message.Message):
    __slots__ = ("verified", "reason", "upstream_revision", "outputs", "time", "not_covered")
    VERIFIED_FIELD_NUMBER: _ClassVar[int]
    REASON_FIELD_NUMBER: _ClassVar[int]
    UPSTREAM_REVISION_FIELD_NUMBER: _ClassVar[int]
    OUTPUTS_FIELD_NUMBER: _ClassVar[int]
    TIME_FIELD_NUMBER: _ClassVar[int]
    NOT_COVERED_FIELD_NUMBER: _ClassVar[int]
    verified: bool
    reason: str
    upstream_revision: str
    outputs: _containers.RepeatedCompositeFieldContainer[OutputParity]
    time: str
    not_covered: str
    def __init__(self, verified: bool = ..., reason: _Optional[str] = ..., upstream_revision: _Optional[str] = ..., outputs: _Optional[_Iterable[_Union[OutputParity, _Mapping]]] = ..., time: _Optional[str] = ..., not_covered: _Optional[str] = ...) -> None: ...

class OutputParity(_message.Message):
    __slots__ = ("output", "dtype", "least_cosine", "relative_error")
    OUTPUT_FIELD_NUMBER: _ClassVar[int]
    DTYPE_FIELD_NUMBER: _ClassVar[int]
    LEAST_COSINE_FIELD_NUMBER: _ClassVar[int]
    RELATIVE_ERROR_FIELD_NUMBER: _ClassVar[int]
    output: str
    dtype: DataType
    least_cosine: float
    relative_error: float
    def __init__(self, output: _Optional[str] = ..., dtype: _Optional[_Union[DataType, str]] = ..., least_cosine: _Optional[float] = ..., relative_error: _Optional[float] = ...) -> None: ...
