// Pages that are opened from a disk may start no worker: there one is a hidden frame instead, so that the search works.
"use strict"
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      const frame = document.createElement("iframe")
      frame.hidden = true
      document.body.appendChild(frame)
      const inside = frame.contentWindow
      const load = address =>
        new Promise((resolve, reject) => {
          const script = inside.document.createElement("script")
          script.src = address
          script.onload = resolve
          script.onerror = reject
          inside.document.head.appendChild(script)
        })
      inside.importScripts = (...addresses) =>
        addresses.reduce((before, address) => before.then(() => load(address)), Promise.resolve())
      // What the worker posts comes here, what is posted to it goes there.
      inside.postMessage = data => this.dispatchEvent(new MessageEvent("message", {data}))
      this.inside = inside
      this.ready = load(url)
    }

    postMessage(data) {
      this.ready.then(() => this.inside.dispatchEvent(new MessageEvent("message", {data})))
    }

    terminate() {
      this.inside.frameElement.remove()
    }
  }
}
