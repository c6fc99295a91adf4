// Filters each list of questions by a group and by words; without it, the list is whole.
for (const place of document.querySelectorAll("[data-questions]")) {
  const rows = [...place.querySelectorAll(".items > li")];
  const search = place.querySelector("input[type=search]");
  const told = place.querySelector("[role=status]");
  const show = () => {
    const chosen = place.querySelector("input[type=radio]:checked").value;
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const groups = row.dataset.groups.split(" ");
      const text = row.textContent.toLowerCase();
      const seen = groups.includes(chosen) && words.every((word) => text.includes(word));
      row.hidden = !seen;
      count += seen;
    }
    told.textContent = `${count} of ${rows.length} questions shown`;
  };
  place.addEventListener("input", show);
  place.querySelector(".filters").hidden = false;
  show();
}
