{{- define "lamina.labels" -}}
app.kubernetes.io/name: lamina
app.kubernetes.io/instance: {{ .Release.Name }}
app.kubernetes.io/version: {{ .Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .Release.Service }}
{{- end }}

{{- define "lamina.image" -}}
{{- with .Values.image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .Values.image.name }}:{{ .Values.image.tag }}
{{- end }}

{{- /* An image of somebody else: dict "root" . "name" "sig-storage/…" */ -}}
{{- define "lamina.sidecar" -}}
{{- with .root.Values.image.registry }}{{ trimSuffix "/" . }}/{{ end }}{{ .name }}
{{- end }}

{{- define "lamina.pod" -}}
{{- with .Values.image.pullSecrets }}
imagePullSecrets:
  {{- range . }}
  - name: {{ . }}
  {{- end }}
{{- end }}
{{- end }}

{{- /* Annotations of a pod with metrics: dict "root" . "port" 4790 */ -}}
{{- define "lamina.metrics" -}}
{{- if .root.Values.metrics.annotations }}
prometheus.io/scrape: "true"
prometheus.io/port: {{ .port | quote }}
prometheus.io/path: /metrics
{{- end }}
{{- end }}

{{- /* The cluster id: minted by the operator into this ConfigMap; pods wait until it is there. */ -}}
{{- define "lamina.clusterEnv" -}}
- name: LAMINA_CLUSTER
  valueFrom:
    configMapKeyRef: {name: lamina-cluster, key: id}
- name: NODE_NAME
  valueFrom:
    fieldRef: {fieldPath: spec.nodeName}
- name: POD_NAME
  valueFrom:
    fieldRef: {fieldPath: metadata.name}
- name: POD_NAMESPACE
  valueFrom:
    fieldRef: {fieldPath: metadata.namespace}
- name: POD_IP
  valueFrom:
    fieldRef: {fieldPath: status.podIP}
- name: LAMINA_LOG
  value: {{ .Values.logLevel | quote }}
{{- end }}
