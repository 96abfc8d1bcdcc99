// Sliders of pictures: a range moves the windows onto a file with all of them. Without this program the middle ones stay.
for (const slider of document.querySelectorAll(".picture-slider")) {
  const { description, values, columns, rows } = JSON.parse(slider.dataset.slider);
  const range = slider.querySelector("input");
  const windows = slider.querySelectorAll(".picture-slider-window");

  const turn = () => {
    const value = values[range.value];
    rows.forEach(({ title, places }, row) => {
      const place = places[range.value];
      windows[row].style.setProperty("--column", place % columns);
      windows[row].style.setProperty("--line", Math.floor(place / columns));
      windows[row].querySelector("img").alt = `${title} (${description}: ${value})`;
    });
    slider.querySelector("label + span").textContent = value;
    range.setAttribute("aria-valuetext", value);
  };
  range.addEventListener("input", turn);
  range.hidden = false;
  turn();
}
