// What a model says, as page elements. Its text never becomes markup: it is only ever put into text nodes.

const FENCE = /^```[^\n]*\n([\s\S]*?)(?:^```[ \t]*$\n?|(?![\s\S]))/m;
const INLINE = /`([^`\n]+)`|\*\*([^*\n]+)\*\*/;

function wrapped(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function inline(parent, text) {
  let rest = text;
  for (let found = INLINE.exec(rest); found; found = INLINE.exec(rest)) {
    parent.append(rest.slice(0, found.index), found[1] !== undefined ? wrapped("code", found[1]) : wrapped("strong", found[2]));
    rest = rest.slice(found.index + found[0].length);
  }
  parent.append(rest);
}

/** Replace the content of `parent` by `text`: fenced code as blocks, `code` and **strong** within lines. */
export function render(parent, text) {
  parent.replaceChildren();
  let rest = text;
  for (let found = FENCE.exec(rest); found; found = FENCE.exec(rest)) {
    inline(parent, rest.slice(0, found.index).replace(/\n$/, ""));
    parent.append(wrapped("pre", found[1].replace(/\n$/, "")));
    rest = rest.slice(found.index + found[0].length).replace(/^\n+/, "");
  }
  inline(parent, rest);
}
