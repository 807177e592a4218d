import { startChat } from "./chat.js";
import { redraw, watchEngine } from "./engine.js";

const tabs = document.querySelectorAll("[data-show]");
for (const tab of tabs) {
  tab.addEventListener("click", () => {
    document.body.dataset.view = tab.dataset.show;
    for (const other of tabs) other.setAttribute("aria-pressed", String(other === tab));
    redraw();
  });
}
startChat();
watchEngine();
