"use strict";
(function () {
  const make = (name, parent, text) => {
    const made = document.createElement(name);
    if (text !== undefined) made.textContent = text;
    parent.append(made);
    return made;
  };
  const number = (value, percent) => {
    if (percent) return (100 * value).toFixed(2) + " %";
    if (value !== 0 && Math.abs(value) < 1e-3) return value.toExponential(3);
    return value.toLocaleString("en", { maximumSignificantDigits: 5 });
  };
  const names = [...document.querySelectorAll(".key")].map((key) => key.textContent);

  for (const chart of document.querySelectorAll(".chart")) {
    const [low, high, left, right] = chart.dataset.axes.split(",").map(Number);
    const [bottom, top] = chart.dataset.axes.split(",").slice(6, 8).map(Number);
    const percent = chart.dataset.percent === "1";
    const curves = [...chart.querySelectorAll(".curve")].map((group) => ({
      group,
      level: group.dataset.level === "1",
      points: group.dataset.points.split(" ").map((pair) => pair.split(":").map(Number)),
    }));
    const steps = [...new Set(curves.flatMap((c) => (c.level ? [] : c.points.map((p) => p[0]))))]
      .sort((a, b) => a - b);
    const cursor = chart.querySelector(".cursor");
    let tip = null;
    let at = -1;

    const hide = () => {
      cursor.replaceChildren();
      if (tip) tip.remove();
      tip = null;
    };
    const show = (index) => {
      if (!steps.length) return;
      hide();
      at = Math.max(0, Math.min(steps.length - 1, index));
      const step = steps[at];
      const x = left + ((step - low) / (high - low)) * (right - left);
      const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
      for (const [key, value] of Object.entries({ x1: x, x2: x, y1: bottom, y2: top }))
        line.setAttribute(key, value);
      cursor.append(line);
      tip = make("div", chart.parentElement);
      tip.className = "tip";
      tip.setAttribute("role", "status");
      make("div", tip, "step " + step);
      for (const { group, level, points } of curves) {
        if (group.classList.contains("off")) continue;
        const point = level ? points[0] : points.reduce((best, p) =>
          Math.abs(p[0] - step) < Math.abs(best[0] - step) ? p : best);
        const row = make("div", tip);
        row.className = "run" + group.dataset.run;
        make("span", row).className = "swatch";
        const who = names.length ? names[group.dataset.run] + ", " : "";
        const when = level || point[0] === step ? "" : " (step " + point[0] + ")";
        make("span", row, who + group.dataset.label + when);
        make("b", row, number(point[1], percent));
      }
      const box = chart.getBoundingClientRect();
      const outer = chart.parentElement.getBoundingClientRect();
      const place = box.left - outer.left + (x / chart.viewBox.baseVal.width) * box.width;
      const room = outer.width - tip.offsetWidth - 8;
      tip.style.left = Math.max(8, Math.min(room, place > outer.width / 2
        ? place - tip.offsetWidth - 12 : place + 12)) + "px";
      tip.style.top = box.top - outer.top + 12 + "px";
    };
    chart.addEventListener("pointermove", (event) => {
      const box = chart.getBoundingClientRect();
      const x = ((event.clientX - box.left) / box.width) * chart.viewBox.baseVal.width;
      const step = low + ((x - left) / (right - left)) * (high - low);
      let best = 0;
      steps.forEach((one, i) => {
        if (Math.abs(one - step) < Math.abs(steps[best] - step)) best = i;
      });
      show(best);
    });
    chart.addEventListener("pointerleave", hide);
    chart.addEventListener("blur", hide);
    chart.addEventListener("keydown", (event) => {
      const move = { ArrowLeft: -1, ArrowRight: 1, Home: -Infinity, End: Infinity }[event.key];
      if (event.key === "Escape") hide();
      if (move === undefined) return;
      event.preventDefault();
      show(at < 0 ? 0 : at + move);
    });
  }

  for (const key of document.querySelectorAll(".key"))
    key.addEventListener("click", () => {
      const on = key.getAttribute("aria-pressed") !== "true";
      key.setAttribute("aria-pressed", String(on));
      for (const curve of document.querySelectorAll('.curve[data-run="' + key.dataset.run + '"]'))
        curve.classList.toggle("off", !on);
    });

  for (const passage of document.querySelectorAll(".passage"))
    passage.addEventListener("click", (event) => {
      const token = event.target.closest("[title]");
      if (!token) return;
      for (const old of passage.querySelectorAll(".picked")) old.classList.remove("picked");
      token.classList.add("picked");
      passage.nextElementSibling.textContent = token.title;
    });
})();
