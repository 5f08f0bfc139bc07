// Says beside the field why a file is not sent, where Gradio would do so in passing and in its own words.
() => {
    const limit = MAX_MEGABYTES * 2 ** 20;
    const problem = (file) => {
        if (!file.type.startsWith("image/"))
            return `${file.name} is not an image. Choose a file such as a PNG or a JPEG.`;
        if (file.size > limit)
            return `${file.name} has ${Math.ceil(file.size / 2 ** 20)} MB. Images may have up to MAX_MEGABYTES MB.`;
        return "";
    };
    const check = (event, files) => {
        if (!files?.length) return;
        const text = [...files].map(problem).find(Boolean) ?? "";
        document.querySelector("#refused").textContent = text;
        if (!text) return;
        event.preventDefault();
        event.stopImmediatePropagation();
        if (event.type === "change") event.target.value = "";
        else event.target.dispatchEvent(new DragEvent("dragleave", {bubbles: true}));
    };
    document.addEventListener("change", (event) => event.target.type === "file" && check(event, event.target.files), true);
    document.addEventListener("click", () => (document.querySelector("#refused").textContent = ""), true);
    document.addEventListener("drop", (event) => check(event, event.dataTransfer.files), true);
}
