"use strict";
// Pictures from the server, and what lies between two of them. Everything from outside is written as text.

// One server-sent event after the other, of a response whose status is 200.
async function* eventsOf(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    text += value;
    for (let end = text.indexOf("\n\n"); end >= 0; end = text.indexOf("\n\n")) {
      const line = text.slice(0, end).split("\n").find((one) => one.startsWith("data: "));
      text = text.slice(end + 2);
      if (line) yield JSON.parse(line.slice(6));
    }
  }
}

// What an answer that is no picture says, in words.
async function refusalOf(response) {
  const found = await response.json().catch(() => null);
  return new Error(found?.error?.message ?? `the server answered ${response.status}`);
}

// Draws a wish; tell(done, total) hears how far it is. Gives a PNG as a data URL.
async function drawn(wish, headers, signal, tell) {
  const body = JSON.stringify({ ...wish, stream: true });
  const response = await fetch("v1/images/generations", { method: "POST", headers, body, signal });
  if (!response.ok) throw await refusalOf(response);
  for await (const event of eventsOf(response)) {
    if (event.error) throw new Error(event.error.message);
    if (event.type === "image_generation.progress") tell(event.done, event.total);
    if (event.type === "image_generation.completed") return `data:image/png;base64,${event.b64_json}`;
  }
  throw new Error("the server ended the answer before the picture was done");
}

// Red, green, blue and alpha of every pixel of an image that is loaded.
function pixelsOf(image) {
  const canvas = new OffscreenCanvas(image.naturalWidth, image.naturalHeight);
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

// Peak signal-to-noise ratio in dB of 8-bit pixels; infinite where they are equal.
function psnrOf(one, other) {
  let sum = 0;
  for (let at = 0; at < one.data.length; at += 4) {
    for (let channel = 0; channel < 3; channel += 1) sum += (one.data[at + channel] - other.data[at + channel]) ** 2;
  }
  return 10 * Math.log10((255 ** 2 * 0.75 * one.data.length) / sum);
}

// Paints |one - other|, `times` as strong.
function paintDifference(canvas, one, other, times) {
  const found = new ImageData(one.width, one.height);
  for (let at = 0; at < found.data.length; at += 1) {
    found.data[at] = at % 4 === 3 ? 255 : Math.min(255, times * Math.abs(one.data[at] - other.data[at]));
  }
  canvas.width = one.width;
  canvas.height = one.height;
  canvas.getContext("2d").putImageData(found, 0, 0);
}
