"use strict";
for (const gallery of document.querySelectorAll("[data-gallery]")) {
  const cards = [...gallery.querySelectorAll("[data-verdict]")];
  const texts = cards.map((card) => card.textContent.toLowerCase());
  const [verdict, category, search] = ["verdict", "category", "search"].map((name) => gallery.querySelector(`[name=${name}]`));
  const shown = gallery.querySelector("output");
  const filter = () => {
    const words = search.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    cards.forEach((card, index) => {
      const matches = (!verdict.value || card.dataset.verdict === verdict.value)
        && (!category.value || card.dataset.category === category.value)
        && words.every((word) => texts[index].includes(word));
      card.hidden = !matches;
      count += matches;
    });
    shown.textContent = `${count} of ${cards.length} shown`;
  };
  gallery.querySelector(".filters").hidden = false;
  for (const control of [verdict, category, search]) control.addEventListener("input", filter);
  filter();
}
