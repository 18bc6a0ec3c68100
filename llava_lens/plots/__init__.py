"""Pictures of scores: over the original picture, as heat maps, as curves, and the one page that explains an answer.

Unusual: matplotlib is imported inside the functions and only as `Figure` objects, so importing this package costs
nothing, no display is needed and no global figure is touched.
"""

from llava_lens.plots.canvas import new_figure, png
from llava_lens.plots.charts import curves, grid, heads_map, plot
from llava_lens.plots.lenses import lens_grid, words_over_image
from llava_lens.plots.pictures import explanation_figure, explanation_png, overlay

__all__ = [
    "curves",
    "explanation_figure",
    "explanation_png",
    "grid",
    "heads_map",
    "lens_grid",
    "new_figure",
    "overlay",
    "plot",
    "png",
    "words_over_image",
]
