// State picker: the page holds one picture per state; native controls choose which one is shown.
// Without this script all pictures stand in a list. A picker may come from a live notebook, hence the guard.
(() => {
  const start = (root) => {
    if (root.dataset.on) return;
    root.dataset.on = "yes";
    const fields = [...root.querySelectorAll("fieldset")];
    const states = [...root.querySelectorAll(".rr-state")];
    const live = root.querySelector(".rr-live");
    const update = (event) => {
      const code = fields.map((field) => {
        const input = field.querySelector("input[type=range], input:checked");
        const output = field.querySelector("output");
        if (output) {
          output.value = field.querySelectorAll("option")[input.value].label;
          input.setAttribute("aria-valuetext", output.value);
        }
        return input.value;
      }).join("-");
      for (const state of states) {
        state.hidden = state.dataset.state !== code;
        if (!state.hidden && event) live.textContent = state.querySelector("figcaption").textContent;
        if (event) state.querySelector("img").loading = "eager";  // the reader plays: fetch the rest
      }
    };
    root.querySelector(".rr-controls").hidden = false;
    root.addEventListener("input", update);
    update();
  };
  const all = () => document.querySelectorAll(".rr-picker").forEach(start);
  if (document.readyState === "loading") document.addEventListener("DOMContentLoaded", all);
  else all();
})();
