// Tables that can be sorted by a click on a column's head. Without JavaScript they stay in their order.
for (const table of document.querySelectorAll("table.sortable")) {
  const heads = [...table.tHead.rows[0].cells], body = table.tBodies[0];
  const value = (row, column) => {
    const cell = row.cells[column], given = cell.dataset.value;
    return given === undefined ? cell.textContent.trim() : given === "" ? null : Number(given);
  };
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.className = "sort";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      // Numbers largest first, words from A on; a second click turns it around.
      const words = typeof value(body.rows[0], column) === "string";
      const before = head.getAttribute("aria-sort");
      const up = before === null ? words : before === "descending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const compared = (a, b) => {
        const x = value(a, column), y = value(b, column);
        if (x === null || y === null) return (x === null) - (y === null);  // what was not measured comes last
        return (up ? 1 : -1) * (words ? x.localeCompare(y, undefined, {numeric: true}) : x - y);
      };
      body.append(...[...body.rows].sort(compared));
    });
  });
}
