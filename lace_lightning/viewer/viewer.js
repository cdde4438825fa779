"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const { rows, blocks, pieces, segments } = data;
  const READS = 3, ANSWER = segments.length;
  const KINDS = { e: ["environment", "the environment wrote this"], a: ["assessment", "assessment"], g: ["tag", "tag"] };
  const OUTCOMES = {
    right: ["✓", "right", (row) => row.found === "chosen right"],
    found: ["◐", "found, not chosen", (row) => row.found === "found but not chosen"],
    wrong: ["✗", "wrong", (row) => row.found === "not found"],
    invalid: ["⚠", "invalid tags", (row) => row.tags_invalid],
  };
  const VERDICTS = { correct: ["✓", "right"], wrong: ["✗", "wrong"], unparsable: ["?", "no answer"] };
  const CHOICES = ["benchmark", "method", "seed"];
  const MAX_SHOWN = 400;

  // ---------------------------------------------------------------- elements: text only ever as text

  const $ = (id) => document.getElementById(id);
  function el(tag, properties = {}, ...children) {
    const { aria = {}, ...rest } = properties;
    const made = Object.assign(document.createElement(tag), rest);
    for (const [name, value] of Object.entries(aria)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
    return made;
  }
  const bdi = (text, className = "") => el("bdi", { className }, text);
  const chip = (name, sign, label) =>
    el("span", { className: `chip ${name}` }, el("span", { aria: { "aria-hidden": "true" } }, sign), ` ${label}`);
  const number = (value) => value.toLocaleString("en");
  const percent = (share) => `${Math.round(100 * share)} %`;

  // ---------------------------------------------------------------- tokens: what viewer/block.py packed

  async function unpacked(block) {
    if (!("DecompressionStream" in window)) throw new Error("This browser is too old to unpack the threads (it has no DecompressionStream).");
    const packed = Uint8Array.from(atob(block), (sign) => sign.charCodeAt(0));
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
    return new Uint8Array(await new Response(stream).arrayBuffer());
  }

  function tokensOf(row, bytes) {
    let at = 0;
    return row.threads.map((thread) => {
      const count = thread.shown;
      const plane = () => bytes.subarray(at, (at += count));
      const whole = (low, middle, high) => Array.from(low, (byte, i) => byte + 256 * (middle ? middle[i] : 0) + 65536 * (high ? high[i] : 0));
      const texts = whole(plane(), plane(), plane()).map((index) => pieces[index]);
      let time = 0;
      const columns = whole(plane(), plane()).map((delta) => (time += delta));
      const kinds = plane();
      const gates = thread.has_gates ? Array.from(plane(), (byte) => byte / 100) : null;
      const ranks = !thread.has_reads ? null : Array.from({ length: READS }, () => {
        const threads = plane(), back = whole(plane(), plane()), shares = plane();
        return { threads, back, shares };
      });
      return { thread, label: "", texts, columns, kinds, gates, ranks, at: new Map(columns.map((column, i) => [column, i])), spans: [] };
    });
  }

  function readsOf(shown, p, i) {
    const { thread, ranks, columns } = shown[p];
    return (ranks || []).flatMap(({ threads, back, shares }) => {
      if (!threads[i]) return [];
      const other = shown.findIndex((one) => one.thread.group === thread.group && one.thread.index === threads[i] - 1);
      const time = columns[i] - back[i];
      return [{ index: threads[i] - 1, p: other, i: other < 0 ? undefined : shown[other].at.get(time), time, share: shares[i] / 100 }];
    });
  }

  // ---------------------------------------------------------------- the list

  const varies = (key) => new Set(rows.map((one) => one[key])).size > 1;
  const seedOf = (row) => `seed ${row.seed}`;
  const choices = CHOICES.filter(varies);

  const items = rows.map((row, index) => {
    const name = Object.keys(OUTCOMES).find((key) => OUTCOMES[key][2](row)) || "wrong";
    const marks = row.threads.filter((thread) => thread.verdict).slice(0, 8);
    const strip = el("span", { className: "marks", aria: { "aria-label": `threads: ${marks.map((t) => VERDICTS[t.verdict][1]).join(", ")}` } },
      ...marks.map((thread) => el("i", { className: thread.verdict, aria: { "aria-hidden": "true" } }, VERDICTS[thread.verdict][0])));
    const where = choices.map((key) => (key === "seed" ? seedOf(row) : row[key]));
    const link = el("a", { href: `#o${index}` },
      el("span", { className: "line" }, chip(name, ...OUTCOMES[name].slice(0, 2)), row.tags_invalid ? chip("invalid", "⚠", "tags") : null, strip),
      el("span", { className: "asked", dir: "auto" }, row.problem.slice(0, 160)),
      el("span", { className: "quiet" }, bdi([row.id, ...where].join(" · "))));
    link.addEventListener("click", (event) => {
      event.preventDefault();
      open(index, true);
    });
    return { li: el("li", {}, link), link, haystack: `${row.id} ${row.problem}`.toLowerCase() };
  });

  const selected = { outcome: "all" };
  const passes = (row, index, outcome = selected.outcome) =>
    (outcome === "all" || OUTCOMES[outcome][2](row)) &&
    CHOICES.every((key) => !selected[key] || String(row[key]) === selected[key]) &&
    (!selected.search || items[index].haystack.includes(selected.search));

  function filter() {
    let count = 0;
    rows.forEach((row, index) => {
      const shown = passes(row, index);
      items[index].li.hidden = !shown;
      count += shown;
    });
    $("count").textContent = count === rows.length ? "" : `${number(count)} of ${number(rows.length)} shown`;
    for (const label of $("outcomes").querySelectorAll("label")) {
      const outcome = label.firstChild.value;
      label.lastChild.textContent = number(rows.filter((row, index) => passes(row, index, outcome)).length);
    }
  }

  function makeFilters() {
    const all = { all: ["", "all"], ...OUTCOMES };
    for (const [name, [sign, label]] of Object.entries(all)) {
      const radio = el("input", { type: "radio", name: "outcome", value: name, checked: name === "all" });
      radio.addEventListener("change", () => { selected.outcome = name; filter(); });
      $("outcomes").append(el("label", { className: `chip ${name}` }, radio, el("span", { aria: { "aria-hidden": "true" } }, sign), el("span", {}, label), el("span", { className: "count" })));
    }
    for (const key of choices) {
      const values = [...new Set(rows.map((row) => String(row[key])))];
      const select = el("select", { id: `by-${key}`, aria: { "aria-label": key } }, el("option", { value: "" }, `every ${key}`), ...values.map((value) => el("option", { value }, key === "seed" ? `seed ${value}` : value)));
      select.addEventListener("change", () => { selected[key] = select.value; filter(); });
      $("choices").append(select);
    }
    $("search").addEventListener("input", (event) => { selected.search = event.target.value.trim().toLowerCase(); filter(); });
  }

  // ---------------------------------------------------------------- one outcome

  let current = -1, shown = [], width = 0, pinned = null, here = null, marked = [];

  async function open(index, byUser) {
    if (!rows[index]) return;
    if (current >= 0) items[current].link.removeAttribute("aria-current");
    current = index;
    items[index].link.setAttribute("aria-current", "true");
    document.body.classList.toggle("opened", byUser || document.body.classList.contains("opened"));
    try { if (byUser && location.hash !== `#o${index}`) history.pushState(null, "", `#o${index}`); } catch { /* inside of a sandboxed frame */ }
    let tokens;
    try {
      tokens = tokensOf(rows[index], await unpacked(blocks[index]));
    } catch (error) {
      $("outcome").replaceChildren(el("p", { className: "note" }, error.message));
      return;
    }
    if (current !== index) return; // another one was opened meanwhile
    shown = tokens;
    width = 0;
    forget();
    draw();
    items[index].link.scrollIntoView({ block: "nearest" });
    if (byUser) { scrollTo(0, 0); $("detail").scrollTop = 0; }
  }

  function draw() {
    const row = rows[current], sections = sectionsOf(row);
    const columns = 1 + Math.max(0, ...shown.map((one) => one.columns.at(-1) ?? 0));
    const step = width || (columns <= 32 ? 1 : columns <= 512 ? 16 : 64);
    const gates = shown.flatMap((one) => one.gates || []);
    const range = gates.reduce(([least, most], gate) => [Math.min(least, gate), Math.max(most, gate)], [1, 0]);
    $("outcome").replaceChildren(heading(row), legend(range, gates.length, step), ...sections.flatMap(([name, members]) => [
      sections.length > 1 ? el("h3", {}, name) : null,
      grid(row, members, step, range),
    ]).filter(Boolean), keys());
    const first = shown.find((one) => one.spans.length);
    if (first) first.spans[0].tabIndex = 0;
  }

  // Threads that were decoded together stand side by side, and so do single threads with the same role.
  function sectionsOf(row) {
    const sizes = {}, sections = new Map();
    for (const thread of row.threads) sizes[thread.group] = (sizes[thread.group] || 0) + 1;
    row.threads.forEach((thread, p) => {
      const name = sizes[thread.group] > 1 ? `${thread.role}, group ${thread.group}` : thread.role;
      const members = [...(sections.get(name) || []), p];
      sections.set(name, members);
      // A single thread has no index among others: it is counted.
      shown[p].label = `thread ${sizes[thread.group] > 1 ? (thread.index ?? members.length - 1) : members.length - 1}`;
    });
    return [...sections];
  }

  function heading(row) {
    const name = Object.keys(OUTCOMES).find((key) => OUTCOMES[key][2](row)) || "wrong";
    return el("header", { className: "problem" },
      el("p", { className: "line" }, chip(name, ...OUTCOMES[name].slice(0, 2)), row.tags_invalid ? chip("invalid", "⚠", "invalid tags") : null,
        el("span", { className: "quiet" }, bdi([row.id, row.benchmark, row.method, varies("seed") ? seedOf(row) : ""].filter(Boolean).join(" · ")))),
      el("h2", { dir: "auto", className: row.problem.length > 300 ? "long" : "" }, row.problem),
      el("p", { className: "quiet" }, "reference answer ", bdi(row.reference || "none", "answer"),
        row.chosen === null ? " · no answer was chosen" : ""));
  }

  function legend([least, most], hasGates, step) {
    const select = el("select", { id: "width", aria: { "aria-label": "columns in a row" } },
      ...[1, 4, 16, 64].map((value) => el("option", { value, selected: value === step }, value === 1 ? "1 column" : `${value} columns`)));
    select.addEventListener("change", () => { width = Number(select.value); draw(); $("width").focus(); });
    const shades = hasGates ? el("span", {}, "gate ", least.toFixed(2), " ", el("span", { className: "ramp", aria: { "aria-hidden": "true" } }, ...Array.from({ length: 10 }, (_, i) => el("i", { className: `t g${i}` }))), " ", most.toFixed(2))
      : el("span", {}, "gates were not recorded");
    return el("div", { className: "legend quiet" }, shades, el("span", { className: "t environment" }, "environment"), el("span", { className: "t assessment" }, "assessment"),
      el("span", { className: "t answered" }, "answer"), el("span", { className: "t tag" }, "tag"), el("span", {}, "· waiting"),
      el("label", {}, "a row is ", select));
  }

  function grid(row, members, step, [least, most]) {
    const head = el("tr", {}, el("th", { scope: "col" }, "t"), ...members.map((p) => threadHead(row, p)));
    const body = el("tbody");
    const columns = 1 + Math.max(0, ...members.map((p) => shown[p].columns.at(-1) ?? 0));
    const next = members.map(() => 0);
    for (const p of members) shown[p].spans = [];
    for (let start = 0; start < columns; start += step) {
      const line = el("tr", {}, el("th", { scope: "row" }, number(start)));
      members.forEach((p, n) => {
        const cell = el("td", { dir: "auto", className: p === row.chosen ? "chosen" : "" });
        const one = shown[p];
        let expected = start;
        while (next[n] < one.columns.length && one.columns[next[n]] < start + step) {
          const i = next[n]++;
          if (one.columns[i] > expected) cell.append(waiting(one.columns[i] - expected));
          expected = one.columns[i] + 1;
          cell.append((one.spans[i] = token(one, p, i, least, most, step === 1)));
        }
        if (expected === start && next[n] < one.columns.length) cell.append(waiting(Math.min(step, columns - start)));
        line.append(cell);
      });
      body.append(line);
    }
    const table = el("table", {}, el("caption", { className: "unseen" }, "Threads side by side; lattice time runs downwards."), el("thead", {}, head), body);
    table.style.setProperty("--threads", members.length);
    return el("div", { className: members.length > 5 ? "scroll wide" : "scroll", tabIndex: -1 }, table);
  }

  const waiting = (count) => el("span", { className: "wait", aria: { "aria-hidden": "true" } }, "·".repeat(Math.min(count, 64)));

  function threadHead(row, p) {
    const { thread, label: name } = shown[p];
    const [sign, label] = VERDICTS[thread.verdict] || ["", ""];
    return el("th", { scope: "col", className: p === row.chosen ? "chosen" : "" },
      el("span", { className: "line" }, el("b", {}, `${p === row.chosen ? "★ " : ""}${name}`),
        label ? chip(thread.verdict, sign, label) : null),
      el("span", { className: "line" }, thread.answer === null ? null : bdi(thread.answer, "answer"), thread.tag ? el("span", { className: `tagged ${thread.tag}` }, thread.tag) : el("span", { className: "quiet" }, "no tag"),
        el("span", { className: "quiet" }, `${number(thread.tokens)} tokens${thread.finished === "length" ? ", cut off" : ""}`)),
      p === row.chosen ? el("span", { className: "unseen" }, "chosen") : null);
  }

  function token(one, p, i, least, most, alone) {
    const kind = one.kinds[i] === ANSWER ? "answered" : (KINDS[segments[one.kinds[i]]] || [""])[0];
    const shade = one.gates ? ` g${most > least ? Math.round((9 * (one.gates[i] - least)) / (most - least)) : 0}` : "";
    const text = one.thread.index === null ? one.texts[i] : one.texts[i].slice(0, MAX_SHOWN);
    const span = el("span", { className: `t ${kind}${shade}`, tabIndex: -1 }, alone ? text.trimStart() || "␣" : text);
    span.place = [p, i];
    return span;
  }

  function keys() {
    const pairs = [["j  k", "next, previous outcome"], ["← →", "token before, after"], ["↑ ↓", "row above, below"], ["shift ← →", "thread to the left, right"], ["enter", "keep the token in view"], ["/", "search"], ["esc", "let go; back to the list"]];
    return el("details", { className: "quiet" }, el("summary", {}, "Keys"), el("dl", {}, ...pairs.flatMap(([key, meaning]) => [el("dt", {}, el("kbd", {}, key)), el("dd", {}, meaning)])));
  }

  // ---------------------------------------------------------------- one token

  function forget() {
    for (const span of marked) span.classList.remove("here", "read1", "read2", "read3");
    marked = [];
    here = pinned = null;
    $("inspector").hidden = true;
  }

  function inspect(p, i) {
    for (const span of marked) span.classList.remove("here", "read1", "read2", "read3");
    const one = shown[p], reads = readsOf(shown, p, i);
    here = [p, i];
    marked = [one.spans[i]];
    one.spans[i].classList.add("here");
    reads.forEach((read, rank) => {
      const span = read.i === undefined ? null : shown[read.p].spans[read.i];
      if (!span) return;
      span.classList.add(`read${rank + 1}`);
      marked.push(span);
    });
    const kind = one.kinds[i] === ANSWER ? "answer" : (KINDS[segments[one.kinds[i]]] || ["", "thought"])[1];
    $("token").replaceChildren(
      el("p", { className: "line" }, el("code", {}, one.texts[i].slice(0, MAX_SHOWN) || "(no text)"), el("span", { className: "quiet" }, [one.label, `t ${one.columns[i]}`, kind, one.gates ? `gate ${one.gates[i].toFixed(2)}` : ""].filter(Boolean).join(" · "))),
      reads.length ? el("ol", { className: "reads" }, ...reads.map((read, rank) => readLine(read, rank))) :
        el("p", { className: "quiet" }, one.ranks ? "It read nothing of other threads." : "What it read was not recorded."));
    $("inspector").hidden = false;
    return [one, reads];
  }

  function readLine(read, rank) {
    const other = shown[read.p];
    const bar = el("span", { className: "bar", aria: { "aria-hidden": "true" } }, el("i"));
    bar.firstChild.style.setProperty("inline-size", `${Math.max(2, 100 * read.share)}%`);
    const before = read.i === undefined ? "" : other.texts.slice(Math.max(0, read.i - 5), read.i).join("").slice(-24);
    const button = el("button", { type: "button", className: `read${rank + 1}` }, `thread ${read.index}, t ${read.time} `, read.i === undefined ? "" : el("span", { className: "quoted", dir: "auto" }, el("span", { className: "quiet" }, before), el("code", {}, other.texts[read.i].slice(0, 80))));
    button.addEventListener("click", () => { if (read.i !== undefined) go(read.p, read.i); });
    return el("li", {}, el("span", { className: "share" }, percent(read.share)), bar, button);
  }

  function say(p, i) {
    const [one, reads] = inspect(p, i);
    const heard = reads.map((read) => `${percent(read.share)} thread ${read.index}, column ${read.time}${read.i === undefined ? "" : `, ${shown[read.p].texts[read.i]}`}`);
    $("spoken").textContent = `${one.texts[i].slice(0, 80)}, ${one.label}, column ${one.columns[i]}${one.gates ? `, gate ${one.gates[i].toFixed(2)}` : ""}${heard.length ? `, read ${heard.join("; ")}` : ""}`;
  }

  function go(p, i) {
    const span = shown[p].spans[i];
    for (const one of shown) for (const other of one.spans) if (other.tabIndex === 0) other.tabIndex = -1;
    span.tabIndex = 0;
    pinned = [p, i];
    span.focus({ preventScroll: true });
    span.scrollIntoView({ block: "nearest", inline: "nearest" });
    say(p, i);
  }

  function listenToTokens() {
    const area = $("outcome");
    area.addEventListener("pointerover", (event) => {
      if (event.pointerType === "mouse" && event.target.place) inspect(...event.target.place);
    });
    area.addEventListener("pointerleave", (event) => {
      if (!$("inspector").contains(event.relatedTarget)) pinned ? inspect(...pinned) : forget();
    });
    area.addEventListener("click", (event) => { if (event.target.place) go(...event.target.place); });
    area.addEventListener("focusin", (event) => { if (event.target.place && String(event.target.place) !== String(here)) say(...event.target.place); });
    area.addEventListener("keydown", (event) => {
      const place = event.target.place, target = place && neighbour(...place, event);
      if (!target) return;
      event.preventDefault();
      go(...target);
    });
    $("close").addEventListener("click", forget);
  }

  function neighbour(p, i, { key, shiftKey }) {
    const one = shown[p], last = one.spans.length - 1, step = Number($("width").value);
    const clamp = (j) => [p, Math.min(last, Math.max(0, j))];
    if (shiftKey && (key === "ArrowLeft" || key === "ArrowRight")) {
      const other = p + (key === "ArrowLeft" ? -1 : 1);
      return shown[other]?.spans.length ? [other, nearest(shown[other].columns, one.columns[i])] : null;
    }
    const moves = { ArrowLeft: () => clamp(i - 1), ArrowRight: () => clamp(i + 1), Home: () => [p, 0], End: () => [p, last], Enter: () => [p, i],
      ArrowUp: () => [p, nearest(one.columns, one.columns[i] - step)], ArrowDown: () => [p, nearest(one.columns, one.columns[i] + step)] };
    return moves[key] ? moves[key]() : null;
  }

  function nearest(columns, column) {
    let best = 0;
    columns.forEach((one, i) => { if (Math.abs(one - column) < Math.abs(columns[best] - column)) best = i; });
    return best;
  }

  // ---------------------------------------------------------------- the page

  function step(by) {
    const visible = rows.map((_, index) => index).filter((index) => !items[index].li.hidden);
    const at = visible.indexOf(current);
    const index = visible[at < 0 ? 0 : Math.min(visible.length - 1, Math.max(0, at + by))];
    if (index !== undefined) { open(index, true); items[index].link.focus({ preventScroll: true }); }
  }

  function back() {
    document.body.classList.remove("opened");
    forget();
    if (current >= 0) items[current].link.focus();
  }

  function listenToKeys() {
    document.addEventListener("keydown", (event) => {
      if (event.ctrlKey || event.metaKey || event.altKey) return;
      if (event.key === "Escape") return $("inspector").hidden ? back() : forget();
      if (/^(INPUT|SELECT|TEXTAREA)$/.test(event.target.tagName) && event.target.type !== "radio") return;
      if (event.key === "/") { event.preventDefault(); $("search").focus(); }
      const inList = event.target.closest?.("#list");
      if (event.key === "j" || (inList && event.key === "ArrowDown")) { event.preventDefault(); step(1); }
      if (event.key === "k" || (inList && event.key === "ArrowUp")) { event.preventDefault(); step(-1); }
    });
    $("back").addEventListener("click", back);
    document.querySelector(".skip").addEventListener("click", (event) => { event.preventDefault(); $("detail").focus(); });
    addEventListener("popstate", fromAddress);
  }

  function fromAddress() {
    const index = /^#o(\d+)$/.exec(location.hash)?.[1];
    if (index !== undefined) open(Number(index), false).then(() => document.body.classList.add("opened"));
    else document.body.classList.remove("opened");
    return index !== undefined;
  }

  const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;
  document.title = $("title").textContent = data.title;
  $("summary").textContent = [plural(rows.length, "outcome"), plural(new Set(rows.map((row) => `${row.benchmark} ${row.id}`)).size, "problem"),
    data.left_out ? `${plural(data.left_out, "outcome")} more left out to keep the page small` : ""].filter(Boolean).join(" · ");
  makeFilters();
  filter();
  $("list").append(...items.map((item) => item.li));
  listenToTokens();
  listenToKeys();
  if (!fromAddress()) open(0, false);
})();
