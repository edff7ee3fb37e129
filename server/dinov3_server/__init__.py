"""The server of dinov3-serving. The version stands here, so that sources which are not installed know it, too."""

__version__ = "0.1.0"
