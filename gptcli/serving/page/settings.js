// What is set: checked here, kept in the address (never the text), explained in a line each.
// A setting left empty is the run's own.
const SETTINGS = [
  ["max_tokens", "Max tokens", {min: 1, max: 65536, step: 1}, "The most tokens to add."],
  ["temperature", "Temperature", {min: 0, max: 100, step: "any"},
   "Below 1, likely tokens get likelier; at 0, the likeliest is taken."],
  ["top_p", "Top-p", {min: 0.000001, max: 1, step: "any"},
   "Draw only from the likeliest tokens that add up to this probability."],
  ["top_k", "Top-k", {min: 1, max: 2 ** 31, step: 1},
   "Draw only from this many of the likeliest tokens."],
  ["min_p", "Min-p", {min: 0, max: 1, step: "any"},
   "Drop tokens below this fraction of the likeliest token's probability."],
  ["seed", "Seed", {min: 0, max: 2 ** 53 - 1, step: 1},
   "The same seed and settings give the same text."],
  ["stop", "Stop", null, "End before any of these texts, one per line; \\n is a line break."],
];
const ESCAPES = {"\\n": "\n", "\\t": "\t", "\\\\": "\\"};
const inputs = {};

for (const [name, label, bounds, help] of SETTINGS) {
  const input = make(bounds ? "input" : "textarea", {
    id: `set-${name}`, ...bounds ? {type: "number", ...bounds} : {rows: 2, spellcheck: false},
  });
  input.setAttribute("aria-describedby", `help-${name}`);
  $("#settings").append(make("div", {className: "setting"},
    make("label", {htmlFor: input.id, textContent: label}), input,
    make("small", {id: `help-${name}`, textContent: help})));
  input.addEventListener("change", () => keep());
  inputs[name] = input;
}

// Shows in the empty settings what holds there.
const suggest = ({max_new_tokens, stop, ...defaults}) => {
  const shown = {...defaults, max_tokens: max_new_tokens, seed: "random",
                 stop: stop.map((text) => JSON.stringify(text).slice(1, -1)).join("\n")};
  for (const [name] of SETTINGS) inputs[name].placeholder = String(shown[name] ?? "") || "off";
};

const settings = () => {
  const found = {};
  for (const [name, label, bounds] of SETTINGS) {
    const input = inputs[name];
    if (!bounds) {
      found[name] = input.value.split("\n").filter(Boolean)
        .map((line) => line.replace(/\\[nt\\]/g, (sign) => ESCAPES[sign]));
    } else if (!input.checkValidity()) {
      input.focus();
      throw new Failure(`${label}: ${input.validationMessage}`);
    } else {
      found[name] = input.value === "" ? null : Number(input.value);
    }
  }
  return found;
};

// The theme: as the system has it, or as chosen here before.
const THEMES = ["auto", "light", "dark"];
const wear = (theme) => {
  document.documentElement.dataset.theme = theme;
  $("#theme").setAttribute("aria-label", `Theme: ${theme}`);
  $("#theme").title = `Theme: ${theme}`;
  $("#theme").textContent = {auto: "◐", light: "○", dark: "●"}[theme];
};
wear(THEMES.find((theme) => theme === stored("localStorage", "theme")) ?? "auto");
$("#theme").addEventListener("click", () => {
  const now = THEMES.indexOf(document.documentElement.dataset.theme);
  const theme = THEMES[(now + 1) % THEMES.length];
  wear(theme);
  stored("localStorage", "theme", theme);
});

const askForKey = () => {
  $("#key").hidden = false;
  $("#key-text").focus();
};
$("#key").addEventListener("submit", (event) => {
  event.preventDefault();
  apiKey = $("#key-text").value.trim();
  stored("sessionStorage", "key", apiKey);
  $("#key").hidden = true;
  notice("");
  begin();
});

const SWITCHES = {shade: true, mono: false};
const dress = () => {
  for (const name of Object.keys(SWITCHES))
    document.documentElement.classList.toggle(name, $(`#${name}`).checked);
};
for (const name of Object.keys(SWITCHES))
  $(`#${name}`).addEventListener("change", () => { dress(); keep(); });

// The address holds the mode, the models and the settings that are set.
const keep = () => {
  const held = new URLSearchParams();
  held.set("mode", mode);
  for (const id of ["model", "with"]) if ($(`#${id}`).value) held.set(id, $(`#${id}`).value);
  for (const [name] of SETTINGS) if (inputs[name].value) held.set(name, inputs[name].value);
  for (const [name, value] of Object.entries(SWITCHES))
    if ($(`#${name}`).checked !== value) held.set(name, Number(!value));
  history.replaceState(null, "", `#${held}`);
};

const recall = () => {
  const held = new URLSearchParams(location.hash.slice(1));
  for (const [name] of SETTINGS) inputs[name].value = held.get(name) ?? "";
  for (const [name, value] of Object.entries(SWITCHES))
    $(`#${name}`).checked = held.has(name) ? held.get(name) === "1" : value;
  for (const id of ["model", "with"]) {
    const select = $(`#${id}`), wanted = held.get(id);
    if ([...select.options].some((option) => option.value === wanted)) select.value = wanted;
  }
  dress();
  return held.get("mode");
};

const copy = async (text, what) => {
  try {
    await navigator.clipboard.writeText(text);
    $("#copied").textContent = `Copied as ${what}.`;
  } catch {
    const area = $("#copy textarea");
    area.value = text;
    $("#copy").showModal();
    area.select();
  }
};
const copyAs = (what, written) => () => {
  try {
    const [path, body] = modes[mode].request();
    copy(written(path, body), what);
  } catch (error) {
    fail(error);
  }
};
$("#curl").addEventListener("click", copyAs("curl", asCurl));
$("#python").addEventListener("click", copyAs("Python", asPython));
