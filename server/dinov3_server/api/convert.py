"""Check an ExtractRequest: which features to compute, and how its images become pixels in the arena."""

from __future__ import annotations

from dataclasses import dataclass

from dinov3_server.api.sources import Source, source_of
from dinov3_server.config.settings import Settings
from dinov3_server.errors import ConfigError, ServingError
from dinov3_server.families import registry
from dinov3_server.models.interface import FeatureSpec, ModelInfo, PixelShape
from dinov3_serving.framing import BytesResolver
from dinov3_serving.v1 import feature_service_pb2 as pb
from dinov3_serving.v1.images import ImageReader, count_rows
from dinov3_serving.v1.request import answer_fingerprint, check_pins, is_bulk, read_outputs


@dataclass
class Query:
    """What to compute for one request.

    `failures` are by image. `row_counts` has the requested rows of each image, also of failed ones. `has_views` is true
    if any image has views.
    """

    spec: FeatureSpec
    fingerprint: str  # of the answer
    bulk: bool
    sources: list[Source]
    failures: dict[int, ServingError]
    row_counts: tuple[int, ...]
    has_views: bool

    @property
    def needs_sizes(self) -> bool:
        """Whether the shape of a row depends on the header of a file."""
        return any(source.rows_with_size for source in self.sources)

    def by_shape(self) -> dict[PixelShape, list[tuple[int, int]]]:
        """Return the (image, view) of the rows of each shape, ascending. Shapes are in order of first use."""
        groups: dict[PixelShape, list[tuple[int, int]]] = {}
        for source in self.sources:
            for row in source.rows:
                if row.shape is not None:
                    groups.setdefault(row.shape, []).append((source.image, row.view))
        return groups


def count_images(request: pb.ExtractRequest) -> int:
    """Return how many images an unchecked request claims, each view as one; 0 if its shape is not that of images."""
    shape = request.pixels.shape
    return sum(map(count_rows, request.images)) or (max(shape[0], 0) if len(shape) == 4 else 0)


def read_request(
    request: pb.ExtractRequest, resolve_bytes: BytesResolver, model: ModelInfo, settings: Settings
) -> Query:
    """Check a request. `resolve_bytes` is that of wire.ParsedMessage.

    Raises ModelMismatch, or InvalidInput if the request is wrong as a whole. Errors of images are in `Query.failures`.
    """
    check_pins(request, model, _canonical)
    spec = read_outputs(request.outputs, model, settings.max_batch_tokens)
    bulk = is_bulk(request)
    reader = ImageReader(
        request,
        model,
        max_images=settings.max_images_per_request,
        max_tokens=settings.max_batch_tokens,
        resolve_bytes=resolve_bytes,
    )
    sources = [source_of(image, reader, settings.max_image_pixels) for image in reader.images]
    row_counts = tuple(len(source.rows) for source in sources)
    has_views = any(image.views for image in request.images)
    fingerprint = answer_fingerprint(model, spec.projection)
    return Query(spec, fingerprint, bulk, sources, reader.failures, row_counts, has_views)


def _canonical(name: str) -> str:
    """Return the registry's name of a model: a pin may use a short name like `vits16`, as `--model` may."""
    try:
        return registry.lookup(name).name
    except ConfigError:
        return name
