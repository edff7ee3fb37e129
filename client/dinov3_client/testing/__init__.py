"""A fake server for tests of code that uses the client. Its features are a formula of the pixels.

    from dinov3_client import Client
    from dinov3_client.testing import FakeServer, expected

    with FakeServer() as server, Client(server.target) as client:
        features = client.extract(pixels, preset="none", dtype="float32")
        np.testing.assert_array_equal(features.patches[0], expected(pixels, "patches"))

Imports neither torch nor anything of the server.
"""

from dinov3_client.testing._failure import Failure
from dinov3_client.testing._formula import expected
from dinov3_client.testing._model import MODEL
from dinov3_client.testing._server import Call, FakeServer

__all__ = ["MODEL", "Call", "Failure", "FakeServer", "expected"]
