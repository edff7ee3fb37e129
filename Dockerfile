# The server and everything it imports. It contains no weights and no code of Meta's, whose licence does not let us
# redistribute them.
#
#   docker build -t dinov3-serving .                                                        torch for the CPU
#   docker build -t dinov3-serving:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .   torch for CUDA
#
# The base can be any image with Python 3.11 or later and its venv module. constraints/dev.txt was resolved for the default
# one. CUDA's libraries come with torch; the driver comes from the host.
ARG BASE=docker.io/library/python:3.11-slim-bookworm


FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# pip is in an environment of its own, so the final image cannot install anything.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/dinov3
WORKDIR /src
COPY constraints/dev.txt constraints/

# The secret is optional, for a mirror or a proxy: docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf
# Only torch itself comes from TORCH_INDEX; its dependencies come from the usual index, with the rest. Removed from torch
# are its own tests, and headers, which are useless without a compiler: 190 MB.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/dinov3/bin/python install --no-cache-dir --no-deps \
    --index-url "${TORCH_INDEX}" -c constraints/dev.txt torch && \
    cd /opt/dinov3/lib/python3.*/site-packages/torch && \
    rm -r include test && find bin -mindepth 1 ! -name torch_shm_manager -delete

COPY pyproject.toml README.md LICENSE ./
COPY protos protos
COPY client client
COPY server server
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/dinov3/bin/python install --no-cache-dir -c constraints/dev.txt '.[server]'


FROM ${BASE}
ARG REVISION=unknown
LABEL org.opencontainers.image.title="dinov3-serving" \
      org.opencontainers.image.description="A gRPC feature server for DINOv3; fetches code and weights, holds none" \
      org.opencontainers.image.revision="${REVISION}"

# git fetches Meta's code and verifies it at every start.
RUN command -v git || { apt-get update && \
    apt-get install --yes --no-install-recommends git ca-certificates && apt-get clean && rm -rf /var/lib/apt/lists/*; }

# /dinov3 is the cache folder, for fetched files and the results of parity checks; mount a volume there to keep it. Mount
# weights that you have at /weights, read-only; a relative --weights is found there. The directories are made here because
# WORKDIR does not make one in every builder, and because a new volume takes the owner of the directory that it covers.
RUN groupadd --gid 10001 dinov3 && \
    useradd --uid 10001 --gid dinov3 --home-dir /nonexistent --shell /usr/sbin/nologin dinov3 && \
    mkdir /weights /dinov3 && chown 10001:10001 /dinov3
WORKDIR /weights
COPY --from=build /opt/dinov3 /opt/dinov3

# A container's loopback cannot be reached from outside it. 0.0.0.0 is every interface of the container's network; what is
# reachable from elsewhere is decided outside: by -p, a Service, a NetworkPolicy.
ENV DINOV3_HOST=0.0.0.0 \
    DINOV3_CACHE_DIR=/dinov3 \
    PATH=/opt/dinov3/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1

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
