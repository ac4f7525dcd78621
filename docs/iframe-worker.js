// Browsers start no worker from a file; the search of these pages then runs in a hidden frame instead.
if (location.protocol === "file:") {
  window.Worker = class extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      document.body.appendChild(this.frame)
      const inside = this.frame.contentWindow
      const waiting = []
      inside.document.open()
      inside.document.write("<!doctype html>")
      inside.postMessage = data => {
        const event = new MessageEvent("message", { data })
        this.dispatchEvent(event)
        if (this.onmessage) this.onmessage(event)
      }
      const script = inside.document.createElement("script")
      script.src = url
      script.onload = () => {
        this.postMessage = data => inside.dispatchEvent(new inside.MessageEvent("message", { data }))
        waiting.forEach(data => this.postMessage(data))
      }
      this.postMessage = data => waiting.push(data)
      inside.document.close()
      inside.document.documentElement.appendChild(script)
    }
    terminate() {
      this.frame.remove()
    }
  }
}
