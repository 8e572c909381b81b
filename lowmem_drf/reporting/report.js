"use strict";
// Clips of one prompt play together, so that they can be compared; the button plays or stops all of them.
const every = [...document.querySelectorAll("video")];
const button = document.getElementById("play");

const row = (video) => [...video.closest(".pair").querySelectorAll("video")];
const start = (video) => video.play().catch(() => {}); // refused while the page is hidden

for (const video of every) {
  video.addEventListener("play", () => {
    for (const other of row(video)) {
      if (other !== video && other.paused) {
        other.currentTime = video.currentTime;
        start(other);
      }
    }
    label();
  });
  video.addEventListener("pause", () => {
    if (!video.ended) row(video).forEach((other) => other.pause());
    label();
  });
}

function label() {
  if (button) button.textContent = every.some((video) => !video.paused) ? "Pause all" : "Play all";
}

button?.addEventListener("click", () => {
  if (every.some((video) => !video.paused)) {
    every.forEach((video) => video.pause());
    return;
  }
  for (const video of every) {
    video.currentTime = 0;
    start(video);
  }
});
