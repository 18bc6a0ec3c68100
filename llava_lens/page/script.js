// Fades the maps, and tells the value of the patch under the pointer. The page says everything without it, too.
const slider = document.querySelector("input[type=range]");
slider.addEventListener("input", () => document.documentElement.style.setProperty("--fade", slider.value));
for (const figure of document.querySelectorAll("figure[data-values]")) {
  const values = JSON.parse(figure.dataset.values), over = figure.querySelector(".over");
  const said = figure.querySelector("output"), unit = figure.dataset.unit;
  const tell = (event) => {
    const box = over.getBoundingClientRect();
    const row = Math.floor((event.clientY - box.top) / box.height * values.length);
    const col = Math.floor((event.clientX - box.left) / box.width * values[0].length);
    const value = values[row]?.[col];
    said.textContent = value === undefined ? "" : `row ${row}, column ${col}: ${value} ${unit}`;
  };
  const stage = figure.querySelector(".stage");
  stage.addEventListener("pointermove", tell);
  stage.addEventListener("pointerdown", tell);
}
