// The page as a whole: its models, its tabs, and where it begins.
const tabs = Object.keys(modes).map((name) => $(`#tab-${name}`));

const choose = (wanted) => {
  mode = wanted in modes ? wanted : "write";
  for (const tab of tabs) {
    const isChosen = tab.id === `tab-${mode}`;
    tab.setAttribute("aria-selected", isChosen);
    tab.tabIndex = isChosen ? 0 : -1;
    $(`#${tab.getAttribute("aria-controls")}`).hidden = !isChosen;
  }
  $("#with-label").hidden = mode !== "compare";
  pop.close();
  $("#facts").textContent = mode === "compare" ? "Two models, one prompt, one seed."
    : lineOf(modelA());
  if (factsOf(modelA())) suggest(factsOf(modelA()).defaults);
  document.title = modelA() ? `${modelA()} – gpt` : "gpt";
  modes[mode].enter();
  keep();
};
for (const [i, tab] of tabs.entries()) {
  tab.addEventListener("click", () => choose(tab.id.slice(4)));
  tab.addEventListener("keydown", (event) => {
    const to = {ArrowRight: i + 1, ArrowLeft: i - 1, Home: 0, End: -1}[event.key];
    if (to === undefined) return;
    event.preventDefault();
    const next = tabs.at(to % tabs.length);
    choose(next.id.slice(4));
    next.focus();
  });
}
for (const id of ["model", "with"])
  $(`#${id}`).addEventListener("change", () => {
    modes[mode].work.stop();
    choose(mode);
  });
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  pop.close();
  modes[mode].work.stop();
});
addEventListener("hashchange", () => choose(recall()));

const begin = async () => {
  try {
    models = (await (await ask("models")).json()).data;
  } catch (error) {
    fail(error);
    return;
  }
  for (const select of [$("#model"), $("#with")])
    select.replaceChildren(...models.map(({id, gptcli: {step, steps}}) => {
      const others = steps.filter((kept) => kept !== step);
      const names = [[id, id], ...others.map((kept) => [`${id}@${kept}`, `${id}, step ${kept}`])];
      const options = names.map(([value, textContent]) => make("option", {value, textContent}));
      return make("optgroup", {label: id}, ...options);
    }));
  // Side by side, two different models are of use.
  $("#with").selectedIndex = $("#with").options.length > 1 ? 1 : 0;
  choose(recall());
  document.documentElement.dataset.ready = "true";
};
recall();
begin();
