const SHOWN = 24;
const filter = document.getElementById("filter");
const lists = [...document.querySelectorAll("[data-list]")].map((list) => ({
  items: [...list.children],
  more: list.insertAdjacentElement("afterend", Object.assign(document.createElement("button"), { type: "button" })),
  limit: SHOWN,
}));
function show() {
  const wanted = filter ? filter.value.trim().toLowerCase() : "";
  for (const { items, more, limit } of lists) {
    const matches = items.filter((item) => item.dataset.name.includes(wanted));
    const visible = new Set(matches.slice(0, limit));
    for (const item of items) item.hidden = !visible.has(item);
    more.hidden = matches.length <= limit;
    more.textContent = `Show all ${matches.length}`;
  }
}
for (const list of lists) {
  list.more.dataset.more = "";
  list.more.addEventListener("click", () => { list.limit = Infinity; show(); });
}
if (filter) { filter.hidden = false; filter.addEventListener("input", show); }
show();
