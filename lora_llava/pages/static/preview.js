"use strict";
// Set before the body is parsed, so that the page never shows all samples at once.
document.documentElement.classList.add("js");

addEventListener("DOMContentLoaded", () => {
  const [previous, place, next, source] = ["previous", "place", "next", "source"].map((id) =>
    document.getElementById(id),
  );
  const articles = [...document.querySelectorAll("article")];
  let current = articles[0];

  const listed = () => {
    const choice = source.selectedOptions[0];
    return "all" in choice.dataset ? articles : articles.filter((a) => a.dataset.source === choice.value);
  };

  const show = (article) => {
    if (!listed().includes(article)) source.selectedIndex = 0;
    const list = listed();
    const at = list.indexOf(article);
    for (const each of articles) each.classList.toggle("now", each === article);
    current = article;
    place.value = list.length ? `${at + 1} of ${list.length}` : "0 of 0";
    previous.disabled = at <= 0;
    next.disabled = at === list.length - 1;
  };

  const follow = () => {
    const named = articles.find((a) => a.id === location.hash.slice(1));
    if (articles.length) show(named || articles[0]);
    else previous.disabled = next.disabled = true;
  };

  // Replace, not push: Back leaves the page however many samples were read.
  const go = (article) => {
    if (!article || article === current) return;
    show(article);
    location.replace(`#${article.id}`);
    // Far down a long sample, start the next one at its top.
    if (article.getBoundingClientRect().top < 0) article.scrollIntoView();
  };

  const step = (by) => {
    const list = listed();
    go(list[list.indexOf(current) + by]);
  };

  previous.addEventListener("click", () => step(-1));
  next.addEventListener("click", () => step(1));
  source.addEventListener("change", () => {
    const list = listed();
    if (list.includes(current)) show(current);
    else go(list[0]);
  });
  addEventListener("keydown", (event) => {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by || event.altKey || event.ctrlKey || event.metaKey || event.shiftKey) return;
    // Also on the filter, where these keys would choose another source; up and down still do.
    event.preventDefault();
    step(by);
  });
  addEventListener("hashchange", follow);
  follow();
});
