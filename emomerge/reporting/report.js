for (const field of document.querySelectorAll(".tools input[type=search]")) field.addEventListener("input", () => {
  const wanted = field.value.trim().toLowerCase();
  for (const row of field.closest(".figures").querySelectorAll("tbody tr")) row.hidden = !row.textContent.toLowerCase().includes(wanted);
});
for (const button of document.querySelectorAll("thead button")) button.addEventListener("click", () => {
  const heading = button.closest("th"), body = heading.closest("table").tBodies[0], column = heading.cellIndex;
  const sign = heading.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  for (const other of heading.parentNode.cells) other.removeAttribute("aria-sort");
  heading.setAttribute("aria-sort", sign > 0 ? "ascending" : "descending");
  const key = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const compare = (a, b) => a === "" || b === "" ? (a === "") - (b === "") : sign * (isNaN(a) || isNaN(b) ? a.localeCompare(b) : a - b);
  body.append(...[...body.rows].sort((a, b) => compare(key(a), key(b))));
});
if (window.vegaEmbed) for (const holder of document.querySelectorAll(".chart")) {
  const specs = JSON.parse(holder.nextElementSibling.textContent), still = holder.innerHTML;
  let shown;
  const draw = () => {
    const layout = specs.narrow && holder.clientWidth < 560 ? "narrow" : "wide";
    if (layout === shown) return;  // within a layout the chart follows its container by itself
    shown = layout;
    vegaEmbed(holder, {...specs[layout], datasets: specs.datasets}, {mode: "vega-lite", renderer: "svg", actions: false}).catch(() => { holder.innerHTML = still; });
  };
  draw();
  addEventListener("resize", draw);
}
