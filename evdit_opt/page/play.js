"use strict";
// All clips of the page play as one: the first leads, the others are put where it is.
const clips = Array.from(document.querySelectorAll("video"));
const button = document.querySelector("#play");
const place = document.querySelector("#place");
const lead = clips[0];
const APART = 0.08; // seconds, about a frame

function follow() {
  for (const clip of clips) {
    const due = lead.currentTime % (clip.duration || Infinity);
    if (Math.abs(clip.currentTime - due) > APART) clip.currentTime = due;
  }
  if (lead.duration) place.value = String(lead.currentTime / lead.duration);
  if (!lead.paused) requestAnimationFrame(follow);
}

button.addEventListener("click", async () => {
  if (lead.paused) {
    await Promise.all(clips.map((clip) => clip.play()));
    follow();
  } else {
    clips.forEach((clip) => clip.pause());
  }
  button.textContent = lead.paused ? "Play" : "Pause";
});

place.addEventListener("input", () => {
  if (lead.duration) lead.currentTime = Number(place.value) * lead.duration;
  follow();
});
