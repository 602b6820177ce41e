const STEP = 24;
const filter = document.getElementById("filter");
const lists = [...document.querySelectorAll("[data-list]")].map((list) => {
  const note = Object.assign(document.createElement("p"), { className: "missing", textContent: "No class has such a name." });
  const more = Object.assign(document.createElement("button"), { type: "button", className: "more" });
  list.after(note, more);
  const items = [...list.children];
  return { items, names: items.map((item) => item.dataset.name.toLowerCase()), note, more, limit: STEP };
});
function show() {
  const wanted = filter ? filter.value.trim().toLowerCase() : "";
  for (const { items, names, note, more, limit } of lists) {
    const matches = items.filter((_, i) => names[i].includes(wanted));
    const visible = new Set(matches.slice(0, limit));
    for (const item of items) item.hidden = !visible.has(item);
    note.hidden = matches.length > 0;
    more.hidden = matches.length <= limit;
    more.textContent = `Show ${Math.min(STEP, matches.length - limit)} more of ${matches.length.toLocaleString("en")}`;
    if (filter) document.getElementById("found").value = wanted ? `${matches.length} of ${items.length}` : "";
  }
}
for (const list of lists) list.more.addEventListener("click", () => { list.limit += STEP; show(); });
if (filter) {
  filter.parentElement.hidden = false;
  filter.addEventListener("input", () => { for (const list of lists) list.limit = STEP; show(); });
}
show();
