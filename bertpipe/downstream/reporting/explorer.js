// The tokenizer explorer: BERT's WordPiece as `tokenizers` has it, over the data that explorer.py gives. Texts go into
// the page as text alone, never as markup.
(() => {
  "use strict";
  const holder = document.getElementById("explorer-data");
  if (!holder) return;
  const data = JSON.parse(holder.textContent);
  const vocabulary = new Set(data.vocabulary);
  const CHINESE = [
    0x4e00, 0x9fff, 0x3400, 0x4dbf, 0x20000, 0x2a6df, 0x2a700, 0x2b73f, 0x2b740, 0x2b81f, 0x2b920, 0x2ceaf, 0xf900,
    0xfaff, 0x2f800, 0x2fa1f,
  ];
  // Their decompositions are newer than the library's Unicode, so there they stay whole.
  const WHOLE = /([\u{105c9}\u{105e4}\u{11383}\u{11385}\u{1138e}\u{11391}\u{113c5}\u{113c7}\u{113c8}\u{11938}\u{16121}-\u{16128}\u{16d68}-\u{16d6a}])/u;

  const within = (ranges) => (character) => {
    const code = character.codePointAt(0);
    for (let at = 0; at < ranges.length; at += 2) if (code >= ranges[at] && code <= ranges[at + 1]) return true;
    return false;
  };
  const [isControl, isSpace, isMark, isPunctuation] = ["control", "space", "mark", "punctuation"].map((kind) =>
    within(data.characters[kind]));
  const isChinese = within(CHINESE);
  const map = (text, change) => Array.from(text, change).join("");

  function normalize(text) {
    if (data.clean_text) text = map(text, (one) => (isControl(one) ? "" : isSpace(one) ? " " : one));
    if (data.handle_chinese_chars) text = map(text, (one) => (isChinese(one) ? ` ${one} ` : one));
    if (data.strip_accents) {
      text = text.split(WHOLE).map((part) => (WHOLE.test(part) ? part : part.normalize("NFD"))).join("");
      text = map(text, (one) => (isMark(one) ? "" : one));
    }
    return data.lowercase ? map(text, (one) => one.toLowerCase()) : text; // one by one: no final sigma
  }

  // A text cut at those of `tokens`, the first and longest wherever they begin: [[part, whether it is one]].
  function cutAt(text, tokens) {
    if (!tokens.length) return [[text, false]];
    const longest = [...tokens].sort((a, b) => b.length - a.length).map((one) => one.replace(/[^\p{L}\p{N}]/gu, escaped));
    return text.split(new RegExp(`(${longest.join("|")})`, "u")).map((part, at) => [part, at % 2 === 1]);
  }
  const escaped = (one) => `\\u{${one.codePointAt(0).toString(16)}}`;

  function words(text) {
    const found = [""];
    for (const one of text) {
      if (isSpace(one)) found.push("");
      else if (isPunctuation(one)) found.push(one, "");
      else found[found.length - 1] += one;
    }
    return found.filter((word) => word);
  }

  // The longest piece from the left, and so on (Devlin et al. 2019 after Schuster and Nakajima 2012).
  function pieces(word) {
    const all = Array.from(word), out = [];
    if (all.length > data.longest) return [data.unknown];
    for (let start = 0; start < all.length; ) {
      let end = all.length, piece = null;
      for (; end > start; end--) {
        piece = (start ? data.prefix : "") + all.slice(start, end).join("");
        if (vocabulary.has(piece)) break;
      }
      if (end === start) return [data.unknown];
      out.push(piece);
      start = end;
    }
    return out;
  }

  // [[piece, ...] of each word or added token].
  function tokenize(text) {
    const out = [];
    for (const [part, isToken] of cutAt(text, data.added)) {
      if (isToken) out.push([part]);
      else for (const [inner, isAdded] of cutAt(normalize(part), data.added_after)) {
        out.push(...(isAdded ? [[inner]] : words(inner).map(pieces)));
      }
    }
    return out;
  }

  const field = document.getElementById("explorer-text"), shown = document.getElementById("explorer-pieces");
  const said = document.getElementById("explorer-count");
  function show() {
    const found = tokenize(field.value), all = found.flat();
    shown.replaceChildren(...found.map((word) => {
      const group = document.createElement("b");
      for (const [at, piece] of word.entries()) {
        const one = document.createElement("span");
        one.textContent = piece;
        one.className = piece === data.unknown ? "unknown" : at ? "on" : "";
        group.append(one);
      }
      return group;
    }));
    const unknown = all.filter((piece) => piece === data.unknown).length;
    said.textContent = `${all.length} ${all.length === 1 ? "piece" : "pieces"}, ${found.length} words and marks`
      + (unknown ? `, ${unknown} unknown` : "");
  }
  field.addEventListener("input", show);
  Object.assign(field, { normalize, tokenize }); // for tests
  show();
})();
