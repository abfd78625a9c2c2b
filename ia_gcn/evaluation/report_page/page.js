// A click on a column's head sorts the table: numbers from the highest, then from the lowest.
for (const table of document.querySelectorAll("table.sortable")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const text = head.classList.contains("name");
    const button = document.createElement("button");
    button.append(...head.childNodes);
    head.append(button);
    button.onclick = () => {
      const first = text ? "ascending" : "descending";
      const order = head.ariaSort === first ? (text ? "descending" : "ascending") : first;
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.ariaSort = order;
      const sign = order === "ascending" ? 1 : -1;
      const rows = [...body.rows].map((row) => {
        const content = row.cells[column].textContent;
        return [row, text ? content : parseFloat(content)];
      });
      // A dash is no number, and stays below.
      rows.sort(([, a], [, b]) =>
        text ? sign * a.localeCompare(b) : isNaN(a) - isNaN(b) || sign * (a - b) || 0
      );
      body.append(...rows.map(([row]) => row));
    };
  });
}
