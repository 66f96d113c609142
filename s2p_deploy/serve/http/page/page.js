"use strict";
// The form: what the server serves goes in, wishes go out, pictures come back.
(() => {
  const at = (id) => document.getElementById(id);
  const secondsBetweenLooks = 1;
  const coarseBelow = 256; // pixels: smaller pictures are shown with their pixels, not smoothed
  let models = [];
  let running = null; // what stops the drawing that runs
  let pair = null; // pixels of the two pictures that are compared

  const headers = () => {
    const token = at("token").value.trim();
    return { "content-type": "application/json", ...(token && { authorization: `Bearer ${token}` }) };
  };

  const tellProblem = (text) => {
    at("problem").hidden = !text;
    at("problem").textContent = text;
  };

  const option = (value, text) => {
    const made = document.createElement("option");
    made.value = value;
    made.textContent = text;
    return made;
  };

  // What is served, as soon as it is.
  const look = async () => {
    const response = await fetch("v1/models", { headers: headers() });
    if (response.status === 401) {
      at("token-field").hidden = false;
      at("about").textContent = "This server asks for a token.";
      return;
    }
    if (!response.ok) throw new Error(`the server answered ${response.status}`);
    models = (await response.json()).data;
    if (models.every((model) => model.ready)) show();
    else {
      at("about").textContent = "The server is loading its models …";
      setTimeout(tryToLook, 1000 * secondsBetweenLooks);
    }
  };

  const tryToLook = () => look().catch(() => {
    at("about").textContent = "The server does not answer.";
    setTimeout(tryToLook, 1000 * secondsBetweenLooks);
  });

  const show = () => {
    const [first, second] = models;
    at("title").textContent = first.id;
    document.title = first.id;
    at("about").textContent = `Recipe ${first.recipe} on ${first.backend}, ${first.sizes[0]} pixels` +
      (second ? `; beside it ${second.id} (recipe ${second.recipe}).` : ".");
    const both = second ? [option("", `${first.id} and ${second.id}`)] : [];
    at("model").replaceChildren(...both, ...models.map((model) => option(model.id, model.id)));
    at("scheduler").append(...first.schedulers.map((name) => option(name, name)));
    at("steps").value = first.steps;
    at("steps").max = first.most_steps;
    at("guidance").value = first.guidance_scale;
    at("guidance").max = first.most_guidance_scale;
    at("prompt").maxLength = at("negative").maxLength = first.most_prompt_characters;
    at("model").disabled = at("draw").disabled = false;
  };

  const wish = () => ({
    prompt: at("prompt").value,
    negative_prompt: at("negative").value,
    seed: Number(at("seed").value),
    num_inference_steps: Number(at("steps").value),
    guidance_scale: Number(at("guidance").value),
    ...(at("scheduler").value && { scheduler: at("scheduler").value }),
  });

  // A model's card, filled while it draws; gives its image.
  const drawWith = async (name, asked, signal) => {
    const card = at("card").content.firstElementChild.cloneNode(true);
    at("pictures").append(card);
    const [image, bar, said] = ["img", "progress", ".said"].map((one) => card.querySelector(one));
    card.querySelector("b").textContent = name;
    bar.setAttribute("aria-label", `Progress of ${name}`);
    said.textContent = "waits";
    const start = performance.now();
    const tell = (done, total) => {
      if (!total) return;
      bar.max = total;
      bar.value = done;
      said.textContent = `${done} of ${total} steps`;
    };
    try {
      image.src = await drawn({ ...asked, model: name }, headers(), signal, tell);
      await image.decode();
    } catch (error) {
      said.textContent = "no picture";
      throw error;
    }
    image.alt = `${asked.prompt}, drawn by ${name}`;
    image.classList.toggle("coarse", image.naturalWidth < coarseBelow);
    image.hidden = false;
    bar.value = bar.max;
    said.textContent = `${image.naturalWidth}x${image.naturalHeight}, ${((performance.now() - start) / 1000).toFixed(2)} s`;
    return image;
  };

  const compare = (images) => {
    pair = images.map(pixelsOf);
    const psnr = psnrOf(...pair);
    at("psnr").textContent = Number.isFinite(psnr) ? `PSNR ${psnr.toFixed(1)} dB` : "none: the pictures are equal";
    at("comparison").hidden = false;
    amplify();
  };

  const amplify = () => {
    const times = Number(at("amplify").value);
    at("times").textContent = times;
    if (!pair) return;
    paintDifference(at("difference"), ...pair, times);
    at("difference").classList.toggle("coarse", pair[0].width < coarseBelow);
  };

  const draw = async () => {
    const names = at("model").value ? [at("model").value] : models.slice(0, 2).map((model) => model.id);
    running = new AbortController();
    at("draw").disabled = true;
    at("stop").hidden = false;
    at("comparison").hidden = true;
    at("pictures").replaceChildren();
    tellProblem("");
    const asked = wish();
    const ended = await Promise.allSettled(names.map((name) => drawWith(name, asked, running.signal)));
    const failed = ended.find((one) => one.status === "rejected")?.reason;
    if (failed && failed.name !== "AbortError") tellProblem(`No picture: ${failed.message}`);
    if (!failed && names.length > 1) compare(ended.map((one) => one.value));
    at("draw").disabled = false;
    at("stop").hidden = true;
  };

  at("wish").addEventListener("submit", (event) => {
    event.preventDefault();
    draw();
  });
  at("stop").addEventListener("click", () => running?.abort());
  at("amplify").addEventListener("input", amplify);
  at("token").addEventListener("change", tryToLook);
  tryToLook();
})();
