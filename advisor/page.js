"use strict";
// Shows what a mark of a chart stands for: under the pointer, or where a finger touches.
(() => {
  const tip = document.getElementById("tip");
  const show = (event) => {
    const mark = event.target.closest("[data-tip]");
    if (!mark) {
      tip.hidden = true;
      return;
    }
    tip.textContent = mark.dataset.tip;
    tip.hidden = false;
    const box = tip.getBoundingClientRect();
    const left = event.clientX + 14 + box.width < innerWidth - 8
      ? event.clientX + 14 : event.clientX - 14 - box.width;
    const top = event.clientY - 12 - box.height > 8
      ? event.clientY - 12 - box.height : event.clientY + 18;
    tip.style.left = `${Math.max(8, Math.min(left, innerWidth - 8 - box.width))}px`;
    tip.style.top = `${top}px`;
  };
  document.addEventListener("pointermove", show);
  document.addEventListener("pointerdown", show);
  document.addEventListener("pointerleave", () => { tip.hidden = true; });
  addEventListener("scroll", () => { tip.hidden = true; }, { passive: true });
  // What is folded away is printed all the same.
  addEventListener("beforeprint", () => {
    document.querySelectorAll("details").forEach((part) => { part.open = true; });
  });
})();
