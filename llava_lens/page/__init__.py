"""One page that shows a person what an answer came from.

Unusual: it is one file that needs no network: picture, maps, style and script are inside, and every text is escaped.
"""

from llava_lens.page.whole import explanation_page

__all__ = ["explanation_page"]
