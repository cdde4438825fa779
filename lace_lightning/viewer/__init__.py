"""The thread viewer: outcomes as one self-contained HTML page."""

from lace_lightning.viewer.page import viewer_page

__all__ = ["viewer_page"]
