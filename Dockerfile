# The server and everything it imports; no weights and no code of Meta's: both have a licence that is not ours to pass on.
#
#   docker build -t dinov3-serving .                                                        torch for the CPU
#   docker build -t dinov3-serving:cuda --build-arg TORCH_INDEX=https://pypi.org/simple .   torch for CUDA
#
# Any image with Python 3.11 or later and its venv module will do as a base. This Python is the one that
# constraints/dev.txt was resolved for. CUDA's libraries come with torch; the driver comes from the host.
ARG BASE=docker.io/library/python:3.11-slim-bookworm


FROM ${BASE} AS build
ARG TORCH_INDEX=https://download.pytorch.org/whl/cpu

# pip stays behind, in an environment of its own: the one that is shipped cannot install anything.
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/dinov3
WORKDIR /src
COPY constraints/dev.txt constraints/

# The secret is for a mirror or a proxy, and optional: docker build --secret id=pip.conf,src=$HOME/.config/pip/pip.conf
# Only torch itself is taken from TORCH_INDEX; what torch needs comes from the usual index, with the rest. Left out of
# torch are its own tests, and headers, which are of no use without a compiler: 190 MB.
RUN --mount=type=secret,id=pip.conf,target=/etc/pip.conf \
    /opt/pip/bin/pip --python /opt/dinov3/bin/python install --no-cache-dir --no-deps \
    --index-url "${TORCH_INDEX}" -c constraints/dev.txt torch && \
    cd /opt/dinov3/lib/python3.*/site-packages/torch && \
    rm -r include test && find bin -mindepth 1 ! -name torch_shm_manager -delete

COPY pyproject.toml README.md ./
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

# git fetches Meta's code and checks it at every start.
RUN command -v git || { apt-get update && \
    apt-get install --yes --no-install-recommends git ca-certificates && apt-get clean && rm -rf /var/lib/apt/lists/*; }

# /dinov3 is the cache folder: what is fetched, and parity checks; mount a volume there to keep it. Weights that you have may be
# mounted at /weights, read-only; a relative --weights is found there. The directories are made here because not every
# builder's WORKDIR makes one, and a new volume takes the owner of what it covers.
RUN groupadd --gid 10001 dinov3 && \
    useradd --uid 10001 --gid dinov3 --home-dir /nonexistent --shell /usr/sbin/nologin dinov3 && \
    mkdir /weights /dinov3 && chown 10001:10001 /dinov3
WORKDIR /weights
COPY --from=build /opt/dinov3 /opt/dinov3

# A container's loopback is its own: bound to it, the server could be reached by nobody. In here "every interface"
# is the container's network, and what of it the world sees is decided outside: by -p, a Service, a NetworkPolicy.
ENV DINOV3_HOST=0.0.0.0 \
    DINOV3_CACHE_DIR=/dinov3 \
    PATH=/opt/dinov3/bin:${PATH} \
    PYTHONDONTWRITEBYTECODE=1

# By number, so that Kubernetes can tell that it is not root.
USER 10001:10001
EXPOSE 50051 8080

# Ready to take requests. Docker reads it (podman: build with --format docker); Kubernetes has probes of its own.
HEALTHCHECK --interval=10s --timeout=5s --start-period=5m --retries=3 CMD ["python", "-c", "\
from http.client import HTTPConnection; from os import environ; \
probe = HTTPConnection('127.0.0.1', int(environ.get('DINOV3_HTTP_PORT', 8080)), timeout=4); \
probe.request('GET', '/readyz'); \
raise SystemExit(probe.getresponse().status != 200)"]

# No shell between: the supervisor is PID 1, gets SIGTERM itself, and drains.
ENTRYPOINT ["dinov3-server"]
CMD ["serve"]
