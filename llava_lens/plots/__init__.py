"""Pictures of scores: over the original picture, as heat maps, curves and bars, and the one that explains an answer.

Unusual: matplotlib is imported inside the functions and only as `Figure` objects, so importing this package costs
nothing, no display is needed and no global figure is touched.
"""

from llava_lens.plots.canvas import new_figure, png
from llava_lens.plots.charts import curves, grid, heads_map, plot
from llava_lens.plots.layers import layer_bars
from llava_lens.plots.lenses import lens_grid, words_over_image
from llava_lens.plots.multiples import attention_over_image, maps_page
from llava_lens.plots.pictures import explanation_figure, explanation_png, overlay
from llava_lens.plots.viewer import attention_viewer

__all__ = [
    "attention_over_image",
    "attention_viewer",
    "curves",
    "explanation_figure",
    "explanation_png",
    "grid",
    "heads_map",
    "layer_bars",
    "lens_grid",
    "maps_page",
    "new_figure",
    "overlay",
    "plot",
    "png",
    "words_over_image",
]
