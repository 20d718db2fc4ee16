{{- define "flashmemory.name" -}}
{{- if contains .Chart.Name .Release.Name -}}
{{ .Release.Name | trunc 50 | trimSuffix "-" }}
{{- else -}}
{{ printf "%s-%s" .Release.Name .Chart.Name | trunc 50 | trimSuffix "-" }}
{{- end -}}
{{- end -}}

{{- define "flashmemory.selector" -}}
app.kubernetes.io/name: {{ .Chart.Name }}
app.kubernetes.io/instance: {{ .Release.Name }}
{{- end -}}

{{- define "flashmemory.labels" -}}
{{ include "flashmemory.selector" . }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .Chart.Name .Chart.Version }}
{{- end -}}

{{- /* Seconds that unpinning the host pool may take */ -}}
{{- define "flashmemory.unpinSeconds" -}}
{{ mulf .Values.hostMemoryGib .Values.shutdown.unpinSecondsPerGib | ceil | int | add 10 }}
{{- end -}}

{{- /* Seconds from SIGTERM until vLLM kills its own workers */ -}}
{{- define "flashmemory.shutdownSeconds" -}}
{{ add .Values.shutdown.drainSeconds (include "flashmemory.unpinSeconds" .) }}
{{- end -}}

{{- define "flashmemory.options" -}}
{{ dict "flashmemory" (merge (dict "host_memory_gib" .Values.hostMemoryGib) .Values.flashmemory) | toJson }}
{{- end -}}

{{- define "flashmemory.resources" -}}
cpu: {{ .Values.cpus | quote }}
memory: {{ addf .Values.hostMemoryGib .Values.systemMemoryGib .Values.shmGib | ceil | int }}Gi
nvidia.com/gpu: {{ .Values.tensorParallelSize }}
{{- end -}}
