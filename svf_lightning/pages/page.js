// Draws the page's figures in its look, and answers to its buttons.
const pageData = JSON.parse(document.getElementById("figures").textContent);
const pageDark = window.matchMedia("(prefers-color-scheme: dark)");
const pageLook = () => pageData.templates[pageDark.matches ? "dark" : "light"];
const asText = (text) => text.replaceAll("&", "&amp;").replaceAll("<", "&lt;").replaceAll(">", "&gt;"); // plotly reads tags
const pageOptions = {responsive: true, displaylogo: false, modeBarButtonsToRemove: ["lasso2d", "select2d"]};
pageOptions.displayModeBar = window.matchMedia("(hover: none)").matches ? false : "hover"; // it lies on colour bars
for (const [id, figure] of Object.entries(pageData.figures)) {
  figure.layout.template = pageLook();
  Plotly.newPlot(id, figure.data, figure.layout, pageOptions);
}
for (const button of document.querySelectorAll("button[data-figure]")) {
  button.addEventListener("click", () => {
    Plotly.relayout(button.dataset.figure, JSON.parse(button.dataset.change));
    for (const other of button.parentElement.children) other.setAttribute("aria-pressed", String(other === button));
  });
}
pageDark.addEventListener("change", () => {
  for (const id of Object.keys(pageData.figures)) Plotly.relayout(id, {template: pageLook()});
});
