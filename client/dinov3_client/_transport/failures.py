"""What gRPC's errors of connections mean, in one line."""

from __future__ import annotations

import re

from dinov3_client._transport import proxy


def unreachable(target: str, tls: bool, details: str) -> str:
    """Return the message for a target to which no connection was made; `details` are gRPC's, which name addresses."""
    how = "with TLS" if tls else "in plain text"
    through = proxy.find(target)
    if through is not None:
        how += f" through the proxy {through}"
    return f"cannot reach {target} {how}{_reason(tls, details)}"


def _reason(tls: bool, details: str) -> str:
    last = " ".join(details.rpartition("last error: ")[2].split())
    if "WRONG_VERSION_NUMBER" in last:
        return ": something answers, but without TLS; leave tls_ca, tls_cert and tls_key out for a server in plain text"
    if "CERTIFICATE_VERIFY_FAILED" in last:
        found = re.search(r"CERTIFICATE_VERIFY_FAILED:? ?([^:]*)", last)
        return (
            f": its certificate is not trusted ({(found and found[1].strip()) or last}); tls_ca must have the "
            "authority that signed it"
        )
    if re.search(r"Hostname Verification|Peer name .* is not in peer certificate", last):
        return f": its certificate is for another name than the target's host ({last})"
    if re.search(r"Expected SETTINGS frame|http1\.x server|HTTP/1\.", last):
        return (
            ": something answers, but does not speak gRPC; if this is the server's HTTP port (of /metrics and "
            f"/readyz), give its gRPC port, 50051 by default ({last})"
        )
    return f" (is it up, and {'with' if tls else 'without'} TLS?): {last}"
