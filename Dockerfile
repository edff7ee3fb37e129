# syntax=docker/dockerfile:1
# The server and everything it imports. It contains no weights and no code of Meta's, whose license does not let us
# redistribute them.
#
#   docker build -t dinov3-serving .                                     torch for the CPU
#   docker build -t dinov3-serving:cuda --build-arg TORCH=cuda .         torch for CUDA
#
# Torch, the other dependencies and our code are one layer each, in this order, so that a change of code ships torch to no
# machine that has it. All packages are pinned by hash in constraints/image (`make lock`).
#
# The base can be any image with Python 3.11 or 3.12 and its venv module. CUDA's libraries come with torch; the driver comes
# from the host.
ARG BASE=docker.io/library/python:3.11-slim-bookworm


# pip, the build backend and the SBOM generator, which are not in the image. Each of the next stages installs below a folder
# of its own, whose content is then a layer. The secret is optional, for a mirror or a proxy:
#   docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf
FROM ${BASE} AS tools
COPY constraints/image/tools.txt /
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    python3 -m venv /opt/tools && \
    /opt/tools/bin/python -m pip install --no-cache-dir --require-hashes -r /tools.txt && \
    python3 -m venv --without-pip /opt/dinov3


# TORCH is cpu or cuda: which lock file. TORCH_INDEX has the wheel for the CPU, which is not on PyPI. Removed are
# torch's own tests, and headers, programs and static libraries, which are useless without a compiler.
FROM tools AS torch
ARG TORCH=cpu
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu
COPY constraints/image/torch-${TORCH}.txt /torch.txt
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/tools/bin/pip --python /opt/dinov3/bin/python install --root /layer --no-cache-dir --no-deps --require-hashes \
    --extra-index-url "${TORCH_INDEX}" -r /torch.txt && \
    rm -rf /layer/opt/dinov3/lib/python3.*/site-packages/torch/include \
           /layer/opt/dinov3/lib/python3.*/site-packages/torch/test && \
    find /layer/opt/dinov3/lib/python3.*/site-packages/torch/bin -mindepth 1 ! -name torch_shm_manager -delete && \
    find /layer -name "*.a" -delete


FROM tools AS dependencies
COPY constraints/image/server.txt /
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/tools/bin/pip --python /opt/dinov3/bin/python install --root /layer --no-cache-dir --no-deps --require-hashes \
    -r /server.txt


FROM tools AS code
WORKDIR /src
COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY client client
COPY server server
RUN /opt/tools/bin/pip wheel --no-index --no-deps --no-build-isolation --wheel-dir /wheel . && \
    /opt/tools/bin/pip --python /opt/dinov3/bin/python install --root /layer --no-index --no-deps /wheel/*.whl


FROM ${BASE} AS runtime

# git fetches Meta's code and verifies it at every start. Debian removes the files of a version when it has a newer one, so
# a pinned version would stop building; the base's tag moves with Debian's security updates too.
# hadolint ignore=DL3008
RUN command -v git || { apt-get update && \
    apt-get install --yes --no-install-recommends git ca-certificates && apt-get clean && rm -rf /var/lib/apt/lists/*; }

# /dinov3 is the cache folder, for fetched files and the results of parity checks; mount a volume there to keep it. Mount
# weights that you have at /weights, read-only; a relative --weights is found there. The directories are made here because
# WORKDIR does not make one in every builder, and because a new volume takes the owner of the directory that it covers.
RUN groupadd --gid 10001 dinov3 && \
    useradd --uid 10001 --gid dinov3 --home-dir /nonexistent --shell /usr/sbin/nologin dinov3 && \
    mkdir /weights /dinov3 && chown 10001:10001 /dinov3 && \
    python3 -m venv --without-pip /opt/dinov3

COPY --from=torch /layer/opt/dinov3 /opt/dinov3
COPY --from=dependencies /layer/opt/dinov3 /opt/dinov3
COPY --from=code /layer/opt/dinov3 /opt/dinov3


# The SBOM lists the Python packages in CycloneDX's format; Debian's own are in /var/lib/dpkg/status, where scanners look.
FROM runtime AS sbom
COPY --from=tools /opt/tools /opt/tools
RUN /opt/tools/bin/pip --python /opt/dinov3/bin/python check && \
    /opt/tools/bin/cyclonedx-py environment --output-reproducible --output-file /sbom.cdx.json /opt/dinov3


FROM runtime
COPY --from=sbom /sbom.cdx.json /opt/dinov3/sbom.cdx.json

# A container's loopback cannot be reached from outside it. 0.0.0.0 is every interface of the container's network; what is
# reachable from elsewhere is decided outside: by -p, a Service, a NetworkPolicy.
ENV DINOV3_HOST=0.0.0.0 \
    DINOV3_CACHE_DIR=/dinov3 \
    PATH=/opt/dinov3/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1

WORKDIR /weights

# By number, so that Kubernetes can verify that it is not root.
USER 10001:10001
EXPOSE 50051 8080

# Healthy means ready to take requests. Docker uses it (podman: build with --format docker); Kubernetes has its own probes.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 CMD ["python", "-c", "\
from http.client import HTTPConnection; from os import environ; \
probe = HTTPConnection('127.0.0.1', int(environ.get('DINOV3_HTTP_PORT', 8080)), timeout=4); \
probe.request('GET', '/readyz'); \
raise SystemExit(probe.getresponse().status != 200)"]

# Without a shell, so that the supervisor is PID 1, gets SIGTERM itself, and finishes the requests in flight.
ENTRYPOINT ["dinov3-server"]
CMD ["serve"]

# Last, because a new value of an argument makes every later step run again.
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG CREATED=unknown
LABEL org.opencontainers.image.title="dinov3-serving" \
      org.opencontainers.image.description="A gRPC feature server for DINOv3; fetches code and weights, holds none" \
      org.opencontainers.image.licenses="Apache-2.0" \
      org.opencontainers.image.version="${VERSION}" \
      org.opencontainers.image.revision="${REVISION}" \
      org.opencontainers.image.created="${CREATED}"
